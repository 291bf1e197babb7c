"""Tensor names in checkpoints of models that were saved with or without their output head."""

from dataclasses import dataclass

from precast.loaders.artifact.errors import PrecastError

from .tensors import Tensors

HEAD = "lm_head.weight"

# Prefixes that wrappers add to every tensor name. transformers cannot load such a checkpoint either.
_WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "module.": "DataParallel or DeepSpeed",
    "_fsdp_wrapped_module.": "FSDP",
    "base_model.model.": "peft",
}


@dataclass(frozen=True, kw_only=True)
class TensorNames:
    """Tensor names in the checkpoints of an architecture.

    Attributes:
        body: prefix of all names except the output head's; transformers' `base_model_prefix`.
        embedding: name of the token embedding after this prefix.
        allows_bare: True if the architecture also accepts names without the prefix, as in a model saved without its
            output head.
    """

    body: str = "model"
    embedding: str = "embed_tokens"
    allows_bare: bool = False

    def canonicalise(self, tensors: Tensors, *, tied: bool) -> Tensors:
        """Return the tensors under the names that they have if the model is saved with its output head.

        If the model was saved without its output head, the names lack the prefix. The prefix is added, except for an
        architecture that allows bare names. If head and embedding are tied, the file may contain only the head, because
        safetensors stores a shared tensor once; the head is then renamed to the embedding.

        Raises:
            PrecastError: a wrapper has renamed all tensors.
        """
        for wrapper, owner in _WRAPPERS.items():
            if tensors and all(name.startswith(wrapper) for name in tensors):
                raise PrecastError(
                    f"every tensor's name begins with {wrapper!r}, a prefix that {owner} adds when it saves a model;"
                    " use transformers to load the model without the wrapper, and save it with save_pretrained."
                )
        prefix = f"{self.body}."
        if not any(name.startswith(prefix) for name in tensors):
            prefix = "" if self.allows_bare else prefix
            tensors = {n if n == HEAD else prefix + n: t for n, t in tensors.items()}
        embedding = f"{prefix}{self.embedding}.weight"
        if tied and embedding not in tensors and HEAD in tensors:
            return {embedding if name == HEAD else name: tensor for name, tensor in tensors.items()}
        return tensors
