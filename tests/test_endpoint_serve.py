"""A real server on the loopback: `transformers serve` with a tiny random Llama, asked through `limbeck.endpoint`."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace

import pytest

from limbeck.endpoint import Endpoint, EndpointSettings, Request
from limbeck.errors import UserError

pytest.importorskip("transformers")
from transformers.utils.import_utils import is_serve_available

if not is_serve_available():
    pytest.skip("transformers[serving] is not installed", allow_module_level=True)

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def write_model(folder):
    """A Llama of a few thousand weights with a tokenizer of bytes and a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    marks = ["<pad>", "<s>", "</s>"]
    vocabulary = {token: number for number, token in enumerate([*marks, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    plain = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(address, model folder, tokenizer folder) of a running server."""
    folder = tmp_path_factory.mktemp("served")
    write_model(folder / "model")
    (folder / "home" / "hub").mkdir(parents=True)  # the server answers /v1/models with 500 without it
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = "from transformers.cli.transformers import main; main()"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "CUDA_VISIBLE_DEVICES": ""}
    words = ["serve", str(folder / "model"), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with (folder / "output.txt").open("wb") as output:
        server = subprocess.Popen([sys.executable, "-c", program, *words], env=environment, stdout=output, stderr=output)
        try:
            end = time.monotonic() + 120
            while True:
                try:
                    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"http://127.0.0.1:{port}/health", timeout=5).read()
                    break
                except OSError:
                    assert server.poll() is None and time.monotonic() < end, (folder / "output.txt").read_text()[-3000:]
                    time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/v1", str(folder / "model")
        finally:
            server.terminate()
            server.wait(30)


def test_a_real_server_answers_and_is_not_asked_again(served, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    address, model = served
    settings = EndpointSettings(address, model, max_tokens=6, retries=0)
    endpoint = Endpoint(settings, tmp_path / "log.jsonl")
    assert endpoint.probe() == []  # it lists the user's cache, which is empty, and answers all the same
    requests = [Request(f"r{n}", f"say {word}") for n, word in enumerate(["one", "two", "three", "two"])]
    answers = endpoint.ask(requests)
    assert [answer.id for answer in answers] == ["r0", "r1", "r2", "r3"] and answers[1].text == answers[3].text
    # one token a byte: "user: say one\n" and "assistant:"
    assert [answer.prompt_tokens for answer in answers] == [24, 24, 26, 24]
    assert all(answer.completion_tokens == 6 and answer.finish_reason == "length" and answer.logprobs is None for answer in answers)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3
    assert Endpoint(settings, tmp_path / "log.jsonl").estimate(requests).to_ask == 0
    plain = replace(settings, chat=False, seed=3, stop="~", logprobs=2)
    assert [answer.prompt_tokens for answer in Endpoint(plain, tmp_path / "log.jsonl").ask(requests)] == [7, 7, 9, 7]


def test_a_wrong_model_and_a_wrong_address_of_a_real_server(served, tmp_path):
    address, model = served
    with pytest.raises(UserError, match="pinned"):
        Endpoint(EndpointSettings(address, "other/model", retries=0), tmp_path / "log.jsonl").ask([Request("a", "say one")])
    with pytest.raises(UserError, match=r"404.*ends in /v1"):
        Endpoint(EndpointSettings(address.removesuffix("/v1"), model, retries=0), tmp_path / "log.jsonl").ask([Request("a", "say one")])
    with pytest.raises(UserError, match="no list of models"):
        Endpoint(EndpointSettings(address.removesuffix("/v1"), model, retries=0), tmp_path / "log.jsonl").probe()
