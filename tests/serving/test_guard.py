"""What stands before every request: key, host, size; and what is never opened."""

from __future__ import annotations

import pickle
import re
import shutil
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from recformer.commands.serve import is_loopback, main, read_key
from recformer.files import UserError
from recformer.serving.app import create_app
from recformer.serving.metrics import Metrics
from recformer.serving.served import Served
from recformer.serving.service import Service
from tests.serving.conftest import KEY, MakeService, client_of


def test_everything_of_the_catalogue_needs_the_key(service: Service) -> None:
    app = create_app(service, KEY)
    client = TestClient(app, "http://shop.example")
    needing = {path for path in app.openapi()["paths"] if path.startswith(("/api", "/v1"))}
    assert len(needing) >= 30
    for path in needing:
        filled = path.replace("{number}", "0")
        for method in app.openapi()["paths"][path]:
            answer = client.request(method, filled)
            assert answer.status_code == 401, (method, path)
    for path in ("/", "/page/page.js", "/page/page.css", "/health", "/ready", "/metrics", "/docs"):
        assert client.get(path).status_code == 200, path
    schemes = app.openapi()["components"]["securitySchemes"]
    assert schemes == {"APIKeyHeader": {"type": "apiKey", "in": "header", "name": "X-API-Key"}}
    assert app.openapi()["paths"]["/api/items"]["get"]["security"] == [{"APIKeyHeader": []}]
    assert client.get("/api/items", headers={"X-API-Key": KEY}).status_code == 200
    for wrong in (KEY[:-1], KEY + "x", "", "ключ".encode()):
        assert client.get("/api/items", headers={"X-API-Key": wrong}).status_code == 401


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("[::1]", 200),
        ("evil.example", 403),
        ("localhost.evil.example:8000", 403),
        ("", 403),
    ],
)
def test_without_a_key_other_names_are_refused(client: TestClient, host: str, status: int) -> None:
    assert client.get("/api/items", headers={"Host": host}).status_code == status


def test_bodies_have_a_limit_with_and_without_a_length(make_service: MakeService) -> None:
    client = client_of(make_service(body=1000))
    head = {"Content-Type": "application/json"}
    fits = b'{"ItemId": "a", "Comment": "tent"' + b" " * 900 + b"}"
    assert client.post("/api/item", content=fits, headers=head).status_code == 200
    long = fits[:-1] + b" " * 1000 + b"}"
    assert client.post("/api/item", content=long, headers=head).status_code == 413
    parts = iter([long[:500], long[500:]])  # sent in chunks, its length unsaid
    assert client.post("/api/item", content=parts, headers=head).status_code == 413


def test_limits_of_k_and_rows(make_service: MakeService) -> None:
    client = client_of(make_service(k=5, rows=2))
    assert client.get("/api/recommend/u", params={"n": 5}).status_code == 200
    assert client.get("/api/recommend/u", params={"n": 6}).status_code == 400
    asked = {"history": ["B1"], "k": 6}
    assert client.post("/v1/recommend", json=asked).status_code == 400
    assert client.post("/v1/recommend", json={"history": ["B1"] * 3}).status_code == 400
    assert client.post("/api/users", json=[{"UserId": str(i)} for i in range(3)]).status_code == 400
    assert client.get("/api/users", params={"n": 2}).json()["Users"] == []


def test_answers_say_what_browsers_may_do(client: TestClient) -> None:
    headers = client.get("/").headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe-inline" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert client.get("/api/items").headers["content-security-policy"] == policy
    docs = client.get("/docs")
    assert len(docs.headers.get_list("content-security-policy")) == 1
    assert "http" not in docs.headers["content-security-policy"]
    addresses = re.findall(r"""(?:src|href|url)[=:]\s*["']([^"']*)""", docs.text)
    assert addresses == [
        "docs/swagger-ui.css",
        "data:,",
        "docs/swagger-ui-bundle.js",
        "openapi.json",
    ]
    for path in ("/docs/swagger-ui.css", "/docs/swagger-ui-bundle.js"):
        assert len(client.get(path).content) > 100_000


class Exploding:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("a pickle was opened",))


def test_no_pickle_is_opened(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "pickled"))
    for name in ("pytorch_model.bin", "model.pt", "vectors.pkl", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(Exploding()))
    Served(folder, "main", Metrics()).close()  # weights lie beside them as safetensors
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="opens no pickled weights"):
        Served(folder, "main", Metrics())
    assert "a pickle" not in capsys.readouterr().out


def test_names_are_no_paths(client: TestClient, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    for name in ("../secret", str(secret), "..", "%2e%2e%2fsecret"):
        client.post("/api/item", json={"ItemId": name, "Comment": "tent"})
        client.get(f"/api/item/{name}")
        client.get(f"/page/{name}")
    for asked in ({"model": str(tmp_path)}, {"model": "../main"}):
        assert client.post("/v1/reload", json=asked).status_code == 400
    assert {path.name for path in tmp_path.iterdir() if path.suffix[:8] != ".sqlite3"} == {"secret"}


def test_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RECFORMER_API_KEY", raising=False)
    assert read_key(None) is None
    monkeypatch.setenv("RECFORMER_API_KEY", KEY + "\n")
    assert read_key(None) == KEY
    path = tmp_path / "key"
    path.write_text("another long enough key\n")
    assert read_key(path) == "another long enough key"
    path.write_text("short")
    with pytest.raises(UserError, match="at least 16"):
        read_key(path)
    path.write_text("schlüssel mit umlaut")
    with pytest.raises(UserError, match="ASCII"):
        read_key(path)


def test_no_key_no_address_that_others_reach(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RECFORMER_API_KEY", raising=False)
    for host in ("0.0.0.0", "::", "192.0.2.1", "shop.example"):
        assert not is_loopback(host)
        with pytest.raises(UserError, match="there is no key"):
            main([str(model_folder), "--host", host])
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost"))
