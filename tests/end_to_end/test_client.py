"""The client commands against a running service."""

import io
import json
import os
import shutil
import subprocess
import sys

import httpx
import numpy as np
import pytest
from conftest import DATA, TINY, read_tensors
from scripted import Answer, scripted

from bonsai_lora.cli.main import main
from bonsai_lora.cli.progress import ProgressLine
from bonsai_lora.client.download import STATE_FOLDER


@pytest.fixture
def run(service, capsys):
    def run(*words):
        code = main([words[0], "--url", service, *map(str, words[1:])])
        return code, *capsys.readouterr()

    return run


def test_push_show_stats_ls_rm(run):
    assert run("ls") == (0, "NAME  BASE  VERSION  ORIGIN  ADAPTERS  PARAMETERS\n", "")
    assert run("push", "plain", TINY / "plain") == (0, "plain: version 1, 14 adapters\n", "")
    code, out, _ = run("ls")
    assert out.splitlines()[1].split() == ["plain", "tiny-qwen3", "1", "peft", "14", "20992"]
    code, out, _ = run("show", "plain")
    assert "model.layers.0.self_attn.q_proj  64    128" in out
    assert "effective_rank".upper() in run("stats", "plain")[1]
    assert "set_count: 1" in run("stats")[1]
    assert json.loads(run("show", "plain", "--json")[1])["version"] == 1
    assert json.loads(run("ls", "--json")[1])[0]["name"] == "plain"
    assert run("rm", "plain") == (0, "", "")
    code, _, err = run("rm", "plain")
    assert code == 1
    assert "set_not_found" in err
    assert "there is no set named 'plain'" in err


def test_texts_of_the_service_do_not_control_the_terminal(run):
    assert run("push", "plain", TINY / "plain", "--base-model-name", "a\x1b[2J\nb")[0] == 0
    for words in (("ls",), ("show", "plain")):
        code, out, _ = run(*words)
        assert code == 0
        assert "a\\x1b[2J\\nb" in out
        assert "\x1b" not in out
    code, _, err = run("show", "\x1b[2J")
    assert code > 0
    assert "\x1b" not in err


def test_apply_from_a_file_and_from_standard_input(run, tmp_path, monkeypatch):
    run("push", "plain", TINY / "plain")
    golden = read_tensors(TINY / "plain" / "golden.safetensors")
    module = "model.layers.0.self_attn.q_proj"
    text = json.dumps(golden[f"{module}.x"].tolist())
    (tmp_path / "x.json").write_text(text)
    code, out, _ = run("apply", "plain", module, tmp_path / "x.json")
    assert code == 0
    assert np.allclose(json.loads(out), golden[f"{module}.delta"], atol=1e-5)
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert run("apply", "plain", module)[1] == out
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert run("apply", "plain", module, "-")[1] == out
    monkeypatch.setattr(sys, "stdin", io.StringIO("[[1, 2"))
    assert run("apply", "plain", module)[0] == 2
    monkeypatch.setattr(sys, "stdin", io.StringIO("[[1, 2]]"))
    code, _, err = run("apply", "plain", module)
    assert (code, "shape_mismatch" in err) == (1, True)


def test_errors_name_the_index_of_a_non_number(run, monkeypatch):
    run("push", "plain", TINY / "plain")
    for number in ("NaN", "1e999"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"[[1, {number}]]"))
        code, _, err = run("apply", "plain", "model.layers.0.self_attn.q_proj")
        assert code == 1
        assert "inputs[0][1] is" in err


def test_invalid_urls(capsys):
    for url in ("foo", "ftp://localhost", "http://a:b"):
        assert main(["ls", "--url", url]) == 2
        assert "is not a valid URL" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_closed_standard_output(service, more):
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "-m", "bonsai_lora.cli.main", "ls", "--url", service, *more]
    done = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, timeout=30, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_pull_a_merged_model(run, service, tmp_path):
    run("push", "plain", TINY / "plain")
    target = tmp_path / "out"
    code, out, _ = run("pull", "tiny-qwen3/plain", "-o", target, "--json")
    assert code == 0
    names = {one["path"] for one in json.loads(out)["files"]}
    assert names == {path.name for path in (TINY / "base").iterdir()}
    with httpx.Client(base_url=service) as client:
        for name in names:
            served = client.get(f"/v1/bases/tiny-qwen3/merged/plain/{name}").content
            assert (target / name).read_bytes() == served
    # Interrupted: one file half there, one gone.
    shard = target / "model-00001-of-00003.safetensors"
    content = shard.read_bytes()
    shard.unlink()
    mark = target / STATE_FOLDER / "model-00001-of-00003.safetensors.tag"
    tag = mark.read_text()
    (target / STATE_FOLDER / f"model-00001-of-00003.safetensors.{tag}.partial").write_bytes(
        content[:5000]
    )
    (target / "config.json").unlink()
    assert run("pull", "tiny-qwen3/plain", "-o", target)[0] == 0
    assert shard.read_bytes() == content
    assert not list((target / STATE_FOLDER).glob("*.partial"))
    assert {path.name for path in target.iterdir()} == names | {STATE_FOLDER}
    # Another version of the set: nothing old is kept.
    with httpx.Client(base_url=service) as client:
        client.delete("/v1/sets/plain/adapters/model.layers.0.self_attn.q_proj")
    # A piece of the old content, and a run that dies before its answer, must not matter.
    (target / STATE_FOLDER / f"model-00001-of-00003.safetensors.{tag}.partial").write_bytes(
        content[:9000]
    )
    assert main(["pull", "--url", "http://127.0.0.1:9", "tiny-qwen3/plain", "-o", str(target)]) == 3
    assert run("pull", "tiny-qwen3/plain", "-o", target)[0] == 0
    with httpx.Client(base_url=service) as client:
        served = client.get(f"/v1/bases/tiny-qwen3/merged/plain/{shard.name}").content
    assert shard.read_bytes() == served != content
    assert not list((target / STATE_FOLDER).glob("*.partial"))


def test_pull_an_adapter_and_missing_models(run, tmp_path):
    run("push", "plain", TINY / "plain")
    assert run("pull", "adapters/plain", "-o", tmp_path / "a")[0] == 0
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["r"] == 8
    assert run("push", "again", tmp_path / "a")[0] == 0
    assert run("pull", "nothing/plain", "-o", tmp_path / "b")[0] == 1
    assert run("pull", "plain", "-o", tmp_path / "b")[0] == 2
    assert run("push", "x", tmp_path / "nowhere")[0] == 2
    code, _, shown = run("push", "x", TINY / "plain", "--architecture", "qwen3")
    assert (code, "leave it out" in shown) == (2, True)
    code, _, shown = run("pull", "adapters/plain", "-o", tmp_path / "x", "--parallel", "0")
    assert (code, "parallel is 0" in shown) == (2, True)
    assert not (tmp_path / "x").exists()


def test_mistakes_with_folders_and_files(run, tmp_path):
    adapter, file, absent = TINY / "plain", tmp_path / "file", tmp_path / "absent"
    file.touch()
    assert run("push", "plain", adapter)[0] == 0
    for words, text in (
        (("push", "x", absent), f"there is no file or folder {absent}; give a folder saved by"),
        (("push", "tests", "x"), "there is no folder x; name the set first, then the folder"),
        (("push", "x", file), f"{file} is a file; give a folder saved by"),
        (("push", "x", tmp_path), f"{tmp_path} has no adapter_config.json; give a folder saved by"),
        (("pull", "adapters/plain", "-o", file), f"{file} is a file; name a folder"),
        (("pull", "adapters/plain", "--gguf", "-o", tmp_path), f"such as {tmp_path}/model.gguf"),
        (("pull", "tiny-qwen3/plain", "--gguf", "-o", absent), "is not a GGUF file; leave out"),
    ):
        code, _, err = run(*words)
        assert (code, text in err) == (2, True), err
    assert not absent.exists()
    assert file.read_bytes() == b""


def test_mistakes_with_what_peft_saves(run, tmp_path):
    """A pickle, a folder of checkpoints, a file in place of its folder, a repository's name."""
    pickled, around = tmp_path / "pickled", tmp_path / "around"
    shutil.copytree(TINY / "plain", around / "checkpoint-5")
    shutil.copytree(TINY / "plain", pickled)
    weights = pickled / "adapter_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    for words, text in (
        (("push", "x", pickled), "a pickle, which is never loaded; save the adapter again with"),
        (("push", "x", around), f"give one of them, such as {around}/checkpoint-5"),
        (("push", "x", pickled / "adapter_config.json"), f"the folder that it is in: {pickled}"),
        (("push", "adapters/x", TINY / "plain"), "is a repository; name the set alone: x"),
        (("apply", "x", "q_proj", "[[1]]"), "there is no file [[1]]; name a JSON file, or none"),
    ):
        code, _, err = run(*words)
        assert (code, text in err) == (2, True), err
    assert run("ls", "--json")[1].strip() == "[]"


@pytest.mark.parametrize("word", ["--url=http://127.0.0.1:1", "--json"])
def test_a_flag_in_front_of_the_command(word, capsys):
    with pytest.raises(SystemExit) as ended:
        main([word, "ls"])
    assert ended.value.code == 2
    assert f"put {word.partition('=')[0]} after the command" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [("show", ".."), ("stats", "."), ("rm", ""), ("pull", "../..", "-o", "x")]
)
def test_invalid_names(run, words):
    code, _, err = run(*words)
    assert code == 2
    assert err.startswith("bonsai-lora: ")


def test_odd_file_names(run, settings, tmp_path):
    base = tmp_path / "bases" / "odd"
    shutil.copytree(TINY / "base", base)
    for name in ("notes#1.txt", "what?.md", "a%41.txt", "space it.txt"):
        (base / name).write_text(name)
    run("push", "plain", TINY / "plain")
    assert run("pull", "odd/plain", "-o", tmp_path / "o")[0] == 0
    assert (tmp_path / "o" / "a%41.txt").read_text() == "a%41.txt"


def test_the_address_and_the_token_of_the_environment(service, capsys, monkeypatch):
    monkeypatch.setenv("BONSAI_LORA_URL", service)
    assert main(["ls", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert main(["ls", "--url", "http://127.0.0.1:9"]) == 3  # a flag beats the variable
    with scripted([Answer(200, b'{"sets": [], "next_cursor": null}')]) as server:
        monkeypatch.setenv("BONSAI_LORA_URL", server.url)
        monkeypatch.setenv("BONSAI_LORA_TOKEN", "bl_secret")
        assert main(["ls", "--header", "X-Team: search", "--header", "X-Empty:"]) == 0
    (head,) = server.heads
    assert b"authorization: bearer bl_secret" in head.lower()
    assert b"X-Team: search" in head
    assert b"X-Empty: \r\n" in head


@pytest.mark.parametrize("text", ["X-Team", "X Team: a", ": a", "X-Team: a\r\nX-More: b", "X: é"])
def test_headers_that_are_malformed(text, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["ls", "--header", text])
    assert exit_.value.code == 2
    assert "is not a header, such as 'X-Team: search'" in capsys.readouterr().err


def test_a_service_of_a_different_kind(capsys):
    with scripted([Answer(200, b"<html>"), Answer(200, b"{}"), Answer(502, b"<html>")]) as server:
        for code, text in (
            (3, "cannot be decoded"),
            (3, "KeyError"),
            (1, "answered 502 Bad Gateway"),
        ):
            assert main(["ls", "--url", server.url]) == code
            assert text in capsys.readouterr().err


def test_no_service(capsys):
    assert main(["ls", "--url", "http://127.0.0.1:9"]) == 3
    error = capsys.readouterr().err
    assert "no service at http://127.0.0.1:9: Connection refused; start one with" in error


def test_secrets_are_not_in_errors(capsys, monkeypatch):
    assert main(["ls", "--url", "http://key:hidden@127.0.0.1:9"]) == 3
    assert "no service at http:...@127.0.0.1:9: " in (shown := capsys.readouterr().err)
    monkeypatch.setenv("BONSAI_LORA_TOKEN", "hidden\n")
    assert main(["ls"]) == 2
    assert "(by default BONSAI_LORA_TOKEN) has a space, a line end" in capsys.readouterr().err
    assert "hidden" not in shown


def test_https_without_tls(service, capsys):
    assert main(["ls", "--url", service.replace("http:", "https:")]) == 3
    assert "it does not use TLS; begin the URL with http://" in capsys.readouterr().err


def test_progress_shows_rate_and_time_left(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    with ProgressLine() as line:
        line.update(1_000_000, 2_000_000)
        line.update(2_000_000, 2_000_000)
    assert "100% 2/2 MB" in screen.getvalue()
    assert "s left" in screen.getvalue()


def test_push_an_mlx_folder(service, tmp_path, capsys):
    folder = tmp_path / "mlx"
    shutil.copytree(DATA / "mlx" / "lora", folder)
    push = ["push", "--url", service, "m", str(folder)]
    assert main([*push, "--base-model-name", "mine"]) == 0
    with httpx.Client(base_url=service) as client:
        info = client.get("/v1/sets/m").json()
    assert (info["origin"], info["base_model_name"]) == ("mlx", "mine")
    (folder / "adapters.safetensors").unlink()
    assert main(push) == 2
    assert "adapter_model.safetensors" in capsys.readouterr().err


def test_a_missing_key_names_the_variable(capsys):
    problem = {"code": "unauthenticated", "detail": "the request has no key", "status": 401}
    kind = ("Content-Type: application/problem+json",)
    with scripted([Answer(401, json.dumps(problem).encode(), kind)]) as server:
        assert main(["ls", "--url", server.url]) == 1
    assert "the request has no key; the command reads it from BONSAI_LORA_TOKEN [" in (
        capsys.readouterr().err
    )


def test_what_cannot_be_read_is_named_without_a_number(run, tmp_path):
    file = tmp_path / "adapter.bin"
    file.write_bytes(b"")
    code, _, err = run("push", "plain", file)
    assert (code, err.count("\n")) == (2, 1)
    assert f"{file} is a file" in err
    file.write_bytes(b"\xff")
    code, _, err = run("apply", "plain", "q_proj", file)
    assert (code, "the vectors are not JSON: 'utf-8' codec" in err) == (2, True)
    missing = tmp_path / "x.json"
    assert run("apply", "plain", "q_proj", missing) == (
        *(2, ""),
        (
            f"bonsai-lora: there is no file {missing}; name a JSON file, or none to read "
            "standard input\n"
        ),
    )
