"""Configs: reading, overriding, checking against a signature, saving."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vistok.config import load_config, save_config
from vistok.signatures import ConfigError, check
from vistok.utils.spelling import nearest


@dataclasses.dataclass(frozen=True)
class Jitter:
    degrees: float = 0.0
    repeats: int = 1

    def __post_init__(self) -> None:
        if self.degrees < 0:
            raise ValueError(f"degrees must be at least 0, got {self.degrees}")


class HidesItsConstructor:
    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)


class Model(HidesItsConstructor):
    def __init__(
        self,
        codebook_size: int,
        dim: int = 8,
        *,
        rate: float = 1.0,
        gradient: Literal["raw", "rotation"] = "raw",
        channels: Literal[1, 3] = 3,
        grid: tuple[int, ...] = (),
        betas: tuple[float, float] | None = None,
        jitter: Jitter | None = None,
        shift: bool = False,
        folder: Path | None = None,
        weights: dict[str, float] | None = None,
        size: int | tuple[int, int] = 1,
        precision: Literal["no", "bf16"] = "bf16",
    ) -> None: ...


def problems(values: dict) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        check(Model, {"codebook_size": 4, **values}, "model")
    return caught.value.args


def test_check_converts_what_yaml_cannot_write():
    values = {
        "codebook_size": 4,
        "rate": 1,
        "grid": [2, 3],
        "betas": [0, 0.5],
        "jitter": {"degrees": 3},
        "folder": "a/b",
        "weights": {"l2": 1},
        "size": [1, 2],
        "precision": False,  # YAML reads a bare no as False
    }
    checked = check(Model, values, "model")
    assert checked["jitter"] == Jitter(degrees=3.0)
    assert checked["grid"] == (2, 3)
    assert checked["betas"] == (0.0, 0.5)
    assert checked["folder"] == Path("a/b")
    assert checked["weights"] == {"l2": 1.0}
    assert checked["size"] == (1, 2)
    assert checked["precision"] == "no"
    assert type(checked["rate"]) is float
    assert "dim" not in checked  # the signature's default stands


def test_sections_in_containers_are_checked_where_they_stand():
    def build(many: tuple[Jitter, ...] | None = None, named: dict[str, Jitter] | None = None) -> None: ...

    values = {"many": [{"degrees": 1}, Jitter(2.0)], "named": {"a": {"repeats": 2}}}
    assert check(build, values, "") == {"many": (Jitter(1.0), Jitter(2.0)), "named": {"a": Jitter(repeats=2)}}
    with pytest.raises(ConfigError) as caught:
        check(build, {"many": [{}, {"degres": 1}], "named": {"a": 3}}, "")
    assert caught.value.args == (
        "many[1].degres: unknown key; did you mean many[1].degrees? allowed: degrees, repeats",
        "named.a: got 3 (int): expected a section {degrees, repeats}",
    )


def test_check_takes_functions_and_ready_dataclasses():
    def build(jitter: Jitter, count: int = 1) -> None: ...

    assert check(build, {"jitter": Jitter(2.0)}, "")["jitter"] == Jitter(2.0)
    with pytest.raises(ConfigError, match=r"^jitter: missing; expected a section \{degrees, repeats\}$"):
        check(build, {}, "")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("dim", "12", "model.dim: got '12' (str): expected int"),
        ("dim", True, "model.dim: got True (bool): expected int"),
        ("dim", 1.5, "model.dim: got 1.5 (float): expected int"),
        ("dim", None, "model.dim: got None (NoneType): expected int"),
        ("rate", "1e-4", "model.rate: got '1e-4' (str): expected float"),
        ("rate", False, "model.rate: got False (bool): expected float"),
        ("rate", float("nan"), "model.rate: got nan (float): expected float, a finite number"),
        ("rate", -float("inf"), "model.rate: got -inf (float): expected float, a finite number"),
        ("betas", [0.9, float("inf")], "model.betas: got [0.9, inf] (list): expected tuple[float, float] | null"),
        ("weights", {"l2": float("nan")}, "model.weights: got {'l2': nan} (dict): expected dict[str, float] | null"),
        ("shift", 1, "model.shift: got 1 (int): expected bool"),
        ("shift", "yes", "model.shift: got 'yes' (str): expected bool"),
        ("channels", True, "model.channels: got True (bool): expected 1 | 3"),
        ("channels", 2, "model.channels: got 2 (int): expected 1 | 3"),
        ("grid", [1, "2"], "model.grid: got [1, '2'] (list): expected tuple[int, ...]"),
        ("grid", "12", "model.grid: got '12' (str): expected tuple[int, ...]"),
        ("betas", [1, 2, 3], "model.betas: got [1, 2, 3] (list): expected tuple[float, float] | null"),
        ("size", [1], "model.size: got [1] (list): expected int | tuple[int, int]"),
        ("weights", {"l2": "x"}, "model.weights: got {'l2': 'x'} (dict): expected dict[str, float] | null"),
        ("jitter", 3, "model.jitter: got 3 (int): expected a section {degrees, repeats} | null"),
        ("jitter", {"degrees": -1}, "model.jitter: degrees must be at least 0, got -1.0"),
        (
            "gradient",
            "rotaton",
            "model.gradient: got 'rotaton' (str): expected 'raw' | 'rotation'; did you mean 'rotation'?",
        ),
    ],
)
def test_check_refuses(key: str, value: object, expected: str):
    assert problems({key: value}) == (expected,)


def test_check_reports_everything_at_once_with_full_keys():
    with pytest.raises(ConfigError) as caught:
        check(Model, {"codebok_size": 4, "dim": "x", "jitter": {"degres": 1, "repeats": 0.5}}, "model")
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("model.codebok_size: unknown key; did you mean model.codebook_size? allowed: codebook_")
    assert lines[1] == "model.dim: got 'x' (str): expected int"
    assert lines[2] == "model.jitter.degres: unknown key; did you mean model.jitter.degrees? allowed: degrees, repeats"
    assert lines[3] == "model.jitter.repeats: got 0.5 (float): expected int"
    assert lines[4] == "model.codebook_size: missing; expected int"


def test_check_refuses_a_section_that_is_no_mapping():
    with pytest.raises(ConfigError, match=r"model: got \[1\] \(list\): expected a section with the keys codebook"):
        check(Model, [1], "model")


def test_check_refuses_signatures_that_it_would_have_to_skip():
    def unannotated(size): ...

    def variadic(**options: int): ...

    with pytest.raises(TypeError, match="'size' has no annotation"):
        check(unannotated, {}, "")
    with pytest.raises(TypeError, match="'options' is variadic"):
        check(variadic, {}, "")


def test_nearest_ignores_case_and_gives_up_on_strangers():
    assert nearest("cifar10", ["CIFAR10", "MNIST"]) == "CIFAR10"
    assert nearest("zebra", ["CIFAR10", "MNIST"]) is None


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text("lr: 1e-4\nmodel:\n  dim: 8\n  width: ${model.dim}\nsizes: [1, 2]\n")
    return path


def test_load_resolves_references_after_overrides(config_file: Path):
    config = load_config(config_file, ["model.dim=16", "sizes=[3]", "wd=5e-2", "note=a=b", "root=null", "flag=true"])
    assert config == {
        "lr": 1e-4,
        "model": {"dim": 16, "width": 16},
        "sizes": [3],
        "wd": 0.05,
        "note": "a=b",
        "root": None,
        "flag": True,
    }
    assert type(config["model"]) is dict
    assert type(config["sizes"]) is list


@pytest.mark.parametrize("override", ["lr", "=3", "--lr=3", "lr =3", "model..dim=3", ""])
def test_load_refuses_malformed_overrides(config_file: Path, override: str):
    with pytest.raises(ConfigError, match="expected key=value, for example"):
        load_config(config_file, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sizes=[1,", "override 'sizes=\\[1,': the value is not valid YAML"),
        ("lr=${nowhere}", "lr: Interpolation key 'nowhere' not found"),
        ("sizes.0=3", r"override 'sizes\.0=3': a list changes as a whole, as in key=\[1,2\]"),
    ],
)
def test_load_refuses_bad_values(config_file: Path, override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(config_file, [override])


@pytest.mark.parametrize("text", ["a: [", "- 1", "3", "a: 1\na: 2", "a: !!python/object/apply:os.getcwd []", "a: ???"])
def test_load_refuses_bad_files(tmp_path: Path, text: str):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml: "):
        load_config(path)


def test_load_names_the_files_near_a_missing_one(config_file: Path):
    with pytest.raises(ConfigError, match=r"bse\.yaml does not exist; near it: base\.yaml"):
        load_config(config_file.with_name("bse.yaml"))
    with pytest.raises(ConfigError, match=r"is a folder; name one of its config files: base\.yaml"):
        load_config(config_file.parent)


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text("ab1e-.:#'\" \n", max_size=8)
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=3),
    max_leaves=8,
)


@given(values=st.dictionaries(st.text("abc", min_size=1), trees, max_size=4))
def test_saved_configs_come_back(tmp_path_factory: pytest.TempPathFactory, values: dict):
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    save_config(values, path)
    assert load_config(path) == values


def test_save_writes_what_yaml_can_hold_and_nothing_otherwise(tmp_path: Path):
    path = tmp_path / "config.yaml"
    save_config({"grid": (1, 2), "folder": Path("a"), "jitter": Jitter(2.0)}, path)
    assert load_config(path) == {"grid": [1, 2], "folder": "a", "jitter": {"degrees": 2.0, "repeats": 1}}
    before = path.read_text()
    with pytest.raises(ConfigError, match=r"model\.parts\[1\]: got .* \(complex\)"):
        save_config({"model": {"parts": [1, 2j]}}, path)
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


# ---------------------------------------------------------------------------------------------------------------------
# Names of earlier versions


@dataclasses.dataclass(frozen=True)
class Trunk:
    num_layers: int = 1
    num_heads: int = 1


def build_trunk(trunk: Trunk = Trunk(), layers: int = 0, attn_drop: float = 0.0) -> None: ...


def test_old_names_are_read_where_only_the_new_one_is_known(caplog):
    given = {"trunk": {"depth": 2, "heads": 3}, "layers": 4, "attention_dropout": 0.5}
    assert check(build_trunk, given, "model") == {"trunk": Trunk(2, 3), "layers": 4, "attn_drop": 0.5}
    told = [record.getMessage() for record in caplog.records]
    assert "model.attention_dropout is called model.attn_drop now" in told
    assert "model.trunk.depth is called model.trunk.num_layers now" in told
    assert not any("model.layers" in message for message in told)


def test_an_old_and_a_new_name_together_are_refused():
    with pytest.raises(ConfigError, match=r"model\.attention_dropout: unknown key"):
        check(build_trunk, {"attention_dropout": 0.5, "attn_drop": 0.5}, "model")
