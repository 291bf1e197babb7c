"""An answer that fails while it is generated: the client learns no detail, and the log has the reason."""

import json

import pytest

BODY = {"model": "copy", "prompt": "the cat", "max_tokens": 4}


@pytest.mark.parametrize("stream", [False, True])
def test_fault_18_an_answer_that_fails_names_no_file(start_server, artifact_copy, stream) -> None:
    server = start_server(artifact_copy)
    weights = artifact_copy / "weights.safetensors"
    weights.write_bytes(weights.read_bytes())
    status, _, answer = server.request(
        "/v1/completions", BODY | {"stream": stream}, headers={"x-request-id": "bad"}
    )
    if stream:
        assert status == 200
        answer = json.loads(answer.strip().rpartition("data: ")[2])
    else:
        assert status == 500
    message = "The answer failed; the server's log gives the reason."
    assert answer["error"] == {
        "message": message,
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }
    (record,) = server.wait_for(lambda: server.records(request_id="bad"))
    assert "weights.safetensors" in record["error"]
