"""Copies of artifacts with a chat template that offers tools in Hermes' form."""

import hashlib
import json
import shutil
from pathlib import Path

TEMPLATE = (
    '{% if tools %}<|im_start|>system\nCall tools with <tool_call>\\n{"name": NAME, "arguments": OBJECT}\\n'
    "</tool_call>.\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}<tool_call>\n{{ call['function'] | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def copy_with_tools(artifact: Path, copy: Path) -> Path:
    """Copy an artifact, replace its chat template by one that offers tools, and return the copy."""
    shutil.copytree(artifact, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    data = TEMPLATE.encode()
    (copy / "chat_template.jinja").write_bytes(data)
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["files"]["chat_template.jinja"].update(entry)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy
