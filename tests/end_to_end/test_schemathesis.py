"""Schemathesis, against the running service: no 5xx, no answer the document does not allow."""

import subprocess
import sys
from pathlib import Path

from conftest import TINY, serving, upload
from keyring import KeysFileMaker, caller

from bonsai_lora.api.app import create_app
from bonsai_lora.service.keys import SCOPES


def test_the_document_and_the_service_agree(settings, tmp_path):
    """With keys, so that each operation is also called without one, and refused."""
    made = KeysFileMaker(tmp_path / "keys.json")
    token = made.add(SCOPES, [""])
    known = settings.model_copy(update={"shared_memory": True, "keys_file": made.path})
    with serving(create_app(known)) as url:
        with caller(url, token) as client:
            upload(client, "plain", TINY / "plain")
        # Both are in the contract, though they begin with a 5: sizes may be beyond any machine, and
        # a model may be loaded with a configuration elsewhere.
        (tmp_path / "schemathesis.toml").write_text(
            '[checks]\nnot_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", "501", "507"]\n'
        )
        command = [
            str(Path(sys.executable).parent / "schemathesis"),
            *["run", f"{url}/openapi.json", "--phases", "examples,coverage,fuzzing"],
            *["--max-examples", "10", "--seed", "1", "--checks", "all"],
            *["--header", f"Authorization: Bearer {token}"],
            # Shapes must fit the set, which no schema can say.
            *["--exclude-checks", "positive_data_acceptance", "--generation-database", "none"],
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=110, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:]
