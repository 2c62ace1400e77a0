"""The quickstart as a new user runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import requests


@pytest.mark.slow
def test_quickstart_twice(repository, tmp_path):
    environment = os.environ | {"OUTPUT_DIR": str(tmp_path / "run"), "PYTHON": sys.executable}
    outputs = []
    for _ in range(2):
        done = subprocess.run(
            ["bash", str(repository / "quickstart.sh")],
            env=environment, capture_output=True, text=True, timeout=1500,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        outputs.append(done.stdout)
    assert "Recformer with a head beats popularity" in outputs[0]
    assert "Recformer with a head beats TF-IDF neighbours" in outputs[0]
    tables = [output[output.index("test users of Cycling") :] for output in outputs]
    assert tables[0] == tables[1]
    assert "epoch" not in outputs[1]  # the second run trains nothing
    command = outputs[1].split("in this checkout:\n", 1)[1].replace("\\\n", " ")
    with subprocess.Popen(
        ["bash", "-c", f"exec {command.strip()} --port 0 --database {tmp_path}/serve.sqlite3"],
        cwd=repository, stdout=subprocess.PIPE, text=True,
    ) as service:  # fmt: skip
        try:
            said = service.stdout.readline()
            address = re.search(r"http://\S+", said)
            assert address, said
            facts = requests.get(f"{address[0]}/v1/facts", timeout=60).json()
        finally:
            service.terminate()
    assert [model["method"] for model in facts["models"]] == ["head", "published"]
    assert facts["test_users"] > 0
    assert service.returncode == 0
