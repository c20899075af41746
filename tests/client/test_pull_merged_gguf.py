"""Merged models downloaded as GGUF files."""

import json

import gguf_models
import httpx
import numpy as np
import pytest
from conftest import gain_of, peft_config, peft_tensors, serving, upload_parts

from bonsai_lora.api.app import create_app
from bonsai_lora.cli.main import main
from bonsai_lora.client.blocking import Client
from bonsai_lora.client.download import STATE_FOLDER
from bonsai_lora.errors import FileNotInModelError

MODULE = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def address(settings, tmp_path, rng):
    """The URL of a service with the GGUF base `bonsai` and the set `s`."""
    (tmp_path / "bases").mkdir()
    raw, _ = gguf_models.model("Q1_0", rng)
    (tmp_path / "bases" / "bonsai.gguf").write_bytes(raw)
    known = settings.model_copy(update={"bases": str(tmp_path / "bases")})
    with serving(create_app(known)) as url:
        with httpx.Client(base_url=url) as http:
            tensors = peft_tensors(rng, MODULE, d_in=256, d_out=256)
            upload_parts(http, "s", peft_config(), tensors)
        yield url


@pytest.fixture
def client(address):
    with Client(address) as client:
        yield client


def test_a_gguf_file_is_pulled_and_kept(client, tmp_path):
    target = tmp_path / "out" / "model.gguf"
    seen = []
    pulled = client.pull_merged_gguf(
        "bonsai", "s", target, dtype="Q8_0", widen="all", on_progress=lambda *one: seen.append(one)
    )
    options = {"dtype": "Q8_0", "widen": "all"}
    whole = client.get_merged_file("bonsai", "s", "bonsai.gguf", **options)
    assert target.read_bytes() == whole
    assert b"".join(client.stream_merged_file("bonsai", "s", "bonsai.gguf", **options)) == whole
    assert seen[-1] == (len(whole), len(whole))
    before = target.stat().st_mtime_ns
    assert client.pull_merged_gguf("bonsai", "s", target, **options) == pulled
    assert target.stat().st_mtime_ns == before


def test_a_partial_file_is_resumed(client, tmp_path):
    target = tmp_path / "model.gguf"
    pulled = client.pull_merged_gguf("bonsai", "s", target)
    whole = target.read_bytes()
    target.unlink()
    partial = tmp_path / STATE_FOLDER / f"model.gguf.{pulled['oid']}.partial"
    partial.write_bytes(bytes(1000))  # kept as it is: only what is missing is asked for
    client.pull_merged_gguf("bonsai", "s", target)
    assert target.read_bytes() == bytes(1000) + whole[1000:]


def test_the_command_pulls_a_gguf_file(address, client, tmp_path, capsys):
    target = tmp_path / "model.gguf"
    arguments = ["pull", "bonsai/s", "--gguf", "-o", str(target), "--url", address]
    assert main([*arguments, "--dtype", "BF16"]) == 0
    assert target.read_bytes() == client.get_merged_file("bonsai", "s", "bonsai.gguf", dtype="BF16")
    for wrong in (["--dtype", "F16"], ["--widen", "all"]):
        plain = [one for one in arguments if one != "--gguf"]
        assert main([*plain, *wrong]) == 2
        assert "add --gguf" in capsys.readouterr().err


def test_a_little_gain_is_a_line_of_the_command(address, tmp_path, rng, capsys):
    raw, _ = gguf_models.model("BF16", rng)
    (tmp_path / "bases" / "wide.gguf").write_bytes(raw)
    tensors = peft_tensors(rng, MODULE, d_in=256, d_out=256)
    small = {name: one * np.float32(0.001) for name, one in tensors.items()}
    with httpx.Client(base_url=address) as http:
        assert upload_parts(http, "small", peft_config(), small).status_code == 201
        path = "/v1/bases/wide/merged/small/wide.gguf"
        gain = gain_of(http, f"{path}?dtype=BF16")
        assert gain_of(http, f"{path}?dtype=F32") > 0.999
    assert 0 < gain < 0.5
    command = ["pull", "wide/small", "--gguf", "--url", address, "-o", str(tmp_path / "wide.gguf")]
    assert main([*command, "--dtype", "F32"]) == 0
    assert capsys.readouterr().err == ""
    assert main([*command, "--dtype", "BF16", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["delta_gain"] == gain
    assert err == (
        f"warning: rounding left {gain:.0%} of the deltas; apply the set beside the base instead, "
        "or pull it with --dtype F32\n"
    )


def test_a_base_without_gguf_file_is_refused(based, rng, tmp_path):
    upload_parts(based, "s", peft_config(), peft_tensors(rng, MODULE, d_in=64, d_out=128))
    with (
        Client(str(based.base_url)) as client,
        pytest.raises(FileNotInModelError, match=r"tiny-qwen3\.gguf"),
    ):
        client.pull_merged_gguf("tiny-qwen3", "s", tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()
