"""push and pull of GGUF LoRA files."""

from conftest import TINY, upload

from bonsai_lora.cli.main import main


def test_pull_resumes_and_push_takes_the_file(based, tmp_path, capsys):
    upload(based, "plain", TINY / "plain")
    url = str(based.base_url)
    expected = based.get("/v1/sets/plain/adapter.gguf?dtype=F16")
    file = tmp_path / "plain.gguf"
    tag = expected.headers["etag"].strip('"')
    state = tmp_path / ".bonsai-pull"
    state.mkdir()
    (state / f"plain.gguf.{tag}.partial").write_bytes(expected.content[:5000])
    pull = ["pull", "adapters/plain", "--gguf", "--dtype", "F16", "-o", str(file), "--url", url]
    assert main(pull) == 0, capsys.readouterr().err
    assert file.read_bytes() == expected.content
    assert main(["push", "back", str(file), "--url", url]) == 0, capsys.readouterr().err
    assert based.get("/v1/sets/back").json()["origin"] == "gguf"
    refused = ["pull", "tiny-qwen3/plain", "--gguf", "-o", str(file), "--url", url]
    assert main(refused) == 2
    assert "base 'tiny-qwen3' is not a GGUF file; leave out --gguf" in capsys.readouterr().err
    refused[1] = "bases/tiny-qwen3"
    assert main(refused) == 2
    assert "a base is not a GGUF LoRA" in capsys.readouterr().err


def test_folded_is_for_folded_bases(based, tmp_path, capsys):
    upload(based, "plain", TINY / "plain")
    pull = ["pull", "adapters/plain", "--folded", "-o", str(tmp_path / "x.gguf")]
    url = ["--url", str(based.base_url)]
    assert main([*pull, *url]) == 2
    assert "--folded and --widen are for GGUF files" in capsys.readouterr().err
    assert main([*pull, "--gguf", *url]) == 1
    assert "folded is true, but no base 'tiny-qwen3'" in capsys.readouterr().err
    assert not (tmp_path / "x.gguf").exists()
