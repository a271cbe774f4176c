"""The settings of a generator that has an engine behind it."""

from pathlib import Path
from typing import Any

import pytest

from shared.errors import ConfigurationError
from shared.settings import load_settings

ENGINE = {"urls": ["http://10.0.0.7:30010/v1/"], "model": "flux"}
GENERATOR = {"kind": "openai", "engine": ENGINE, "defaults": {"num_inference_steps": 4, "guidance_scale": 1}}


@pytest.fixture(autouse=True)
def no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def generators(**changes: Any) -> dict[str, Any]:
    return {"generators": {"flux": GENERATOR | changes}, "default_generator": "flux"}


def test_an_engine_needs_its_address_its_model_and_the_defaults_of_its_requests() -> None:
    engine = load_settings(model=generators()).model.generators["flux"].engine
    assert engine is not None
    assert engine.urls == ["http://10.0.0.7:30010/v1"]


@pytest.mark.parametrize(
    ("changes", "mistake"),
    [
        ({"engine": None}, "belong together"),
        ({"kind": "diffusers", "source": "."}, "belong together"),
        ({"defaults": {"guidance_scale": 1}}, "set defaults.num_inference_steps"),
        ({"defaults": {}}, "set defaults.num_inference_steps, defaults.guidance_scale"),
        ({"source": "org/model"}, "an engine loads its model itself"),
        ({"ip_adapter": {"source": "org/adapter"}}, "an engine loads its model itself"),
        ({"engine": ENGINE | {"urls": []}}, "engine.urls"),
        ({"engine": ENGINE | {"urls": ["ftp://host"]}}, "must start with http:// or https://"),
        ({"engine": ENGINE | {"urls": ["http://me:secret@host/v1"]}}, "must not hold a user or a password"),
        ({"engine": ENGINE | {"urls": ["http://host/v1?key=secret"]}}, "must end with the path"),
        ({"engine": ENGINE | {"fields": {"steps": "steps"}}}, "engine.fields.steps"),
        ({"engine": ENGINE | {"modes": ["img2img"]}}, "engine.modes"),
        ({"engine": ENGINE | {"retries": 3}}, "there is no such setting"),
    ],
)
def test_a_mistake_is_named_without_a_secret(changes: dict[str, Any], mistake: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        load_settings(model=generators(**changes))
    assert mistake in str(raised.value)
    assert "secret" not in str(raised.value)


def test_a_parameter_that_the_engine_does_not_take_needs_no_default() -> None:
    engine = ENGINE | {"fields": {"num_inference_steps": "", "guidance_scale": ""}}
    load_settings(model=generators(engine=engine, defaults={}))


def test_the_key_may_be_in_a_file_of_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "afterimage_model__generators__flux__engine__api_key").write_text("sk-of-a-file")
    (tmp_path / "afterimage.toml").write_text(
        '[model]\ndefault_generator = "flux"\n'
        '[model.generators.flux]\nkind = "openai"\ndefaults = { num_inference_steps = 4, guidance_scale = 1 }\n'
        '[model.generators.flux.engine]\nurls = ["http://10.0.0.7:30010/v1"]\nmodel = "flux"\n'
        'fields = { guidance_scale = "true_cfg_scale" }\n'
    )
    monkeypatch.setenv("AFTERIMAGE_SECRETS_DIR", str(tmp_path / "secrets"))
    engine = load_settings().model.generators["flux"].engine
    assert engine is not None
    assert engine.api_key is not None
    assert engine.api_key.get_secret_value() == "sk-of-a-file"
    assert "sk-of-a-file" not in repr(engine)
    assert engine.fields["guidance_scale"] == "true_cfg_scale"
    assert engine.fields["seed"] == "seed"
