"""Configuration: strict, every error at once with its line and the nearest name, and a fingerprint of what counts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from lamina import config as configuration
from lamina.config import MethodConfig, RunConfig, Section, fingerprint, load, parse_override, renamed, to_yaml
from lamina.errors import ConfigError
from lamina.methods import METHODS
from lamina.methods.inflora import InfLoRAConfig

SETTINGS = {name: method.config_type for name, method in METHODS.items()}


def read(folder: Path, text: str, *overrides: str) -> RunConfig:
    file = folder / "run.yaml"
    file.write_text(text)
    return load(file, [parse_override(text) for text in overrides], method_settings=SETTINGS, schema=RunConfig)


def given(*overrides: tuple[str, Any]) -> RunConfig:
    return load(None, overrides, method_settings=SETTINGS, schema=RunConfig)


def problems(folder: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        read(folder, text, *overrides)
    first, *found = str(refused.value).splitlines()
    assert first == f"{len(found)} error{'s' * (len(found) > 1)} in {folder / 'run.yaml'}:"
    return [line.strip() for line in found]


@pytest.mark.parametrize("section", Section.__subclasses__(), ids=lambda section: section.__name__)
def test_every_setting_is_explained_and_sections_are_frozen_and_strict(section: type[Section]):
    for name, field in section.model_fields.items():
        assert field.description, f"{section.__name__}.{name} has no sentence under it"
    assert section.model_config["frozen"]
    assert section.model_config["extra"] == "forbid"


def test_nothing_said_is_a_complete_run():
    config = given()
    assert config.method == {"name": "lamina"} | SETTINGS["lamina"]().model_dump(mode="json")
    assert (config.training.lr, config.training.head_lr) == (1e-3, 5e-3)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3


def test_what_is_written_is_read_back(tmp_path: Path):
    config = given(("method.rank", 3), ("stream.scenario", "domain"), ("data.crop_scale", [0.5, 1]), ("seed", 4))
    assert read(tmp_path, to_yaml(config)) == config
    assert list(yaml.safe_load(to_yaml(config))) == list(RunConfig.model_fields)
    assert read(tmp_path, "") == given()


def test_all_errors_at_once_each_with_its_line_and_the_nearest_name(tmp_path: Path):
    found = problems(
        tmp_path,
        """\
seed: -1
method:
  name: inflora
  rnk: 3
  epsilon: 2
trainig: {epochs: 3}
training:
  epochs: many
  lr: 1e-3
  schedule: cosin

backbone: {targets: [k, w]}
data:
  crop_scale: [0.5, 0.1]
  columns:
    lable: x
stream:
  plan:
    - {name: a, classes: [x]}
    - name: b
      clases: [x]
""",
    )
    expected = [
        "line 1: seed = -1: input should be greater than or equal to 0",
        "line 4: method.rnk = 3: no such setting. There are: rank, .* Did you mean 'rank'?",
        "line 5: method.epsilon = 2: input should be less than or equal to 1",
        "line 6: trainig = {'epochs': 3}: no such setting. There are: method, .* Did you mean 'training'?",
        "line 8: training.epochs = 'many': allowed is a whole number",
        "line 10: training.schedule = 'cosin': input should be 'constant', .* Did you mean 'cosine'?",
        "line 12: backbone.targets.1 = 'w': input should be 'q', 'k', 'v', 'out', 'fc1', 'fc2', 'gate', 'up' or 'down'",
        "line 14: data.crop_scale = [0.5, 0.1]: must be two numbers with 0 < smallest <= largest <= 1",
        "line 16: data.columns.lable = 'x': no such setting. There are: image, .* Did you mean 'label'?",
        "line 20: stream.plan.1.classes = .*: field required",
        "line 21: stream.plan.1.clases = ['x']: no such setting. .* Did you mean 'classes'?",
    ]
    assert len(found) == len(expected), found
    found.sort(key=lambda line: (int(line.split()[1][:-1]), line))
    for line, pattern in zip(found, expected, strict=True):
        start, _, end = pattern.partition(".*")
        assert line.startswith(start), line
        assert line.endswith(end), line


def test_an_unknown_method_is_answered_with_the_nearest(tmp_path: Path):
    names = ", ".join(METHODS)
    expected = f"method.name = 'infloro': not one of the methods: {names}. Did you mean 'inflora'?"
    assert problems(tmp_path, "\nmethod: {name: infloro}") == [f"line 2: {expected}"]
    assert problems(tmp_path, "method: infloro") == [f"line 1: {expected}"]
    assert problems(tmp_path, "method: [1]") == ["line 1: method = [1]: must be a name, or a name and settings"]


@pytest.mark.parametrize(
    "text", ["3: 4", "method: {2: 3}", "training: 3", "training: null", "training: [1]", "seed: {a: 1}"]
)
def test_settings_of_another_form_are_one_error_with_a_line(text: str, tmp_path: Path):
    (found,) = problems(tmp_path, text)
    assert found.startswith("line 1: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [("[1]", "must hold keys and values, not a list"), ("a: [1", "not YAML"), ("a: b: c", "not YAML")],
)
def test_what_is_no_configuration_at_all(text: str, message: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=rf"run.yaml: {message}"):
        read(tmp_path, text)


def test_a_file_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"gone.yaml: cannot be read"):
        load(tmp_path / "gone.yaml", method_settings=SETTINGS, schema=RunConfig)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ConfigError, match=r"bytes.yaml: (cannot be read|not YAML)"):
        load(tmp_path / "bytes.yaml", method_settings=SETTINGS, schema=RunConfig)


# --------------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("seed: 1\ntraining: {lr: 1}\nseed: 2\n", "line 3: seed is set twice, on lines 1 and 3"),
        ("training:\n  lr: 1\n  epochs: 3\n  lr: 2\n  lr: 3\n", "line 4: training.lr is set twice, on lines 2 and 4"),
        ("training: {lr: 1}\ntraining.lr: 2\n", "line 2: training.lr is set twice, on lines 1 and 2"),
        ("a: &x [1]\nb: *x\n", r"line 2: the alias \*x is not allowed"),
        ("a: &x [*x]\n", r"line 1: the alias \*x is not allowed"),
        ("a: " + 2000 * "[" + 2000 * "]", "line 1: more than 30 levels of nesting"),
        ("- " * 2000, "line 1: more than 30 levels of nesting"),
        (f"seed: {10_000 * '9'}", "line 1: an integer of 10,000 digits"),
        (f"seed: 0x{9_998 * 'f'}", "line 1: an integer of 10,000 digits"),
        (f"? {10_000 * '9'}\n: seed", "line 1: an integer of 10,000 digits"),
        ("seed: 2020-13-45", "not YAML: month must be in 1..12"),
        ("seed: 1\n---\nseed: 2\n", "not YAML: line 2: expected a single document"),
        ("seed: !!python/object/apply:os.getcwd []", "not YAML: line 1: could not determine a constructor"),
        ("a" * 2**20 + "b: 1", "longer than 1,048,576 characters"),
    ],
    ids=lambda text: text[:24],
)
def test_yaml_that_says_things_twice_or_grows_without_bound(text: str, told: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=f"run.yaml: {told}"):
        read(tmp_path, text)


def test_an_alias_bomb_costs_nothing():
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join(10 * [f'*a{n - 1}'])}]" for n in range(1, 10)]
    with pytest.raises(ConfigError, match=r"line 2: the alias \*a0 is not allowed"):
        parse_override("a={" + ",\n".join(lines) + "}")


def test_a_long_value_is_cut_in_its_message(tmp_path: Path):
    (found,) = problems(tmp_path, f"seed: [{', '.join(5_000 * ['1'])}]")
    assert len(found) < 200


def test_what_an_endless_file_holds_is_not_read(tmp_path: Path):
    with pytest.raises(ConfigError, match="/dev/zero: "):
        load(Path("/dev/zero"), method_settings=SETTINGS, schema=RunConfig)


@pytest.mark.parametrize("key", ["training.lr", "training.head_lr", "training.weight_decay", "training.later_lr"])
def test_rates_have_a_bound(key: str):
    with pytest.raises(ConfigError, match=rf"{key} = 1e\+300: input should be less than or equal to 1000"):
        given((key, 1e300))


# ------------------------------------------------------------------------------------- settings of older versions


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("consolidation.merge", "ema", "now called consolidation.merging. Write consolidation.merging = 'ema'"),
        ("consolidation.head", "local", "now called consolidation.classifier. Write consolidation.classifier = 'own'"),
        ("consolidation.own_rank", 3, "now called consolidation.class_covariance_rank"),
        ("stream.joined", True, "now called stream.joint. Write stream.joint = True"),
        ("consolidation.classifier", "local", "'local' is now called 'own'"),
        ("consolidation.drift", "oracle", "'oracle' is now called 'remeasured'"),
        ("training.distil", 1, "this setting was removed: self-distillation"),
        ("keep_chain", True, "this setting was removed: "),
    ],
)
def test_a_setting_of_an_older_version_is_refused_with_the_new_name(key: str, value: Any, told: str, tmp_path: Path):
    text = yaml.safe_dump({key: value} if "." not in key else {key.split(".")[0]: {key.split(".")[1]: value}})
    (found,) = problems(tmp_path, text)
    assert found.startswith(f"line {text.count(chr(10))}: {key} = ")
    assert told in found
    with pytest.raises(ConfigError) as refused:
        given((key, value))
    assert told in str(refused.value)


def test_old_names_exist_no_more_and_new_ones_do():
    keys = set(RunConfig.model_fields)
    for section, field in RunConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            keys |= {f"{section}.{name}" for name in field.annotation.model_fields}
    old, new = {*renamed.RENAMED, *renamed.REMOVED}, {*renamed.RENAMED.values()}
    assert {key for key in new if not key.startswith("method.")} <= keys
    assert not old & keys


# ---------------------------------------------------------------------------------------------------------- --set


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("training.lr=1e-3", "training.lr", 1e-3),
        ("training.lr=2.5E+2", "training.lr", 250.0),
        ("a=-.5e-3", "a", -5e-4),
        ("a=0.001", "a", 0.001),
        ("seed=3", "seed", 3),
        ("backbone.targets=[q, v]", "backbone.targets", ["q", "v"]),
        ("stream.joint=true", "stream.joint", True),
        ("data.per_class=null", "data.per_class", None),
        ("data.source=a=b", "data.source", "a=b"),
        (" seed =3", "seed", 3),
        ("a='1e-3'", "a", "1e-3"),
        ("a='12'", "a", "12"),
        ("a=nan", "a", "nan"),
        ("a=", "a", None),
    ],
)
def test_overrides_are_yaml(text: str, key: str, value: object):
    found = parse_override(text)
    assert found == (key, value)
    assert type(found[1]) is type(value)


@pytest.mark.parametrize("text", ["seed", "=3", " =3"])
def test_overrides_without_a_key_or_a_value(text: str):
    with pytest.raises(ConfigError, match=r"write it as key=value, for example --set training.lr=0.001"):
        parse_override(text)
    with pytest.raises(ConfigError, match=r"--set 'seed=\[': not YAML"):
        parse_override("seed=[")


def test_overrides_lie_on_top_of_the_file(tmp_path: Path):
    text = "method: finetune\ntraining: {lr: 1e-2, epochs: 3}\n"
    config = read(tmp_path, text, "method.rank=7", "training.lr=1e-4", "data.columns.label=y")
    assert config.method == {"name": "finetune", "rank": 7}
    assert (config.training.lr, config.training.epochs, config.data.columns.label) == (1e-4, 3, "y")
    assert read(tmp_path, text, "method.name=prototype").method == {"name": "prototype", "metric": "cosine"}


def test_an_error_of_an_override_is_not_blamed_on_a_line(tmp_path: Path):
    text = "training:\n  lr: 1e-2\n"
    assert problems(tmp_path, text, "training.lr=-1") == ["training.lr = -1: input should be greater than 0"]
    assert problems(tmp_path, text, "seed=-1") == ["seed = -1: input should be greater than or equal to 0"]
    (found,) = problems(tmp_path, text, "training.rate=1")
    assert found.startswith("training.rate = 1: no such setting.")


def test_numbers_are_numbers_and_names_stay_names(tmp_path: Path):
    """Classes called 0 and 1, as those of digits are; a domain called nan."""
    text = """
training: {lr: 1e-3, weight_decay: 1E-2}
stream: {scenario: mixed, plan: [{name: "1e3", classes: ["0", "1"], domains: [nan, inf, "1e5"]}]}
"""
    config = read(tmp_path, text)
    assert (config.training.lr, config.training.weight_decay) == (1e-3, 1e-2)
    (task,) = config.stream.plan
    assert (task.name, task.classes, task.domains) == ("1e3", ("0", "1"), ("nan", "inf", "1e5"))
    assert read(tmp_path, to_yaml(config)) == config


# ---------------------------------------------------------------------------------------------------- fingerprint


def print_of(config: RunConfig) -> str:
    return fingerprint(config, METHODS[config.method["name"]].config_type)


def test_a_setting_at_its_default_is_no_part_of_a_fingerprint():
    """So one that is added later changes no fingerprint."""

    class Later(InfLoRAConfig):
        another: int = 3

    config = given(("method.name", "inflora"), ("method.epsilon", 0.9))
    assert fingerprint(config, Later) == print_of(config)
    more = config.model_copy(update={"method": config.method | {"another": 4}})
    assert fingerprint(more, Later) != print_of(config)


def test_a_fingerprint_is_of_what_decides_the_result():
    same = [
        given(),
        given(("data.source", "elsewhere/photos")),
        given(("data.cache", "/tmp/cache")),
        given(("backbone.name", "a/copy")),
        given(("checkpoint_seconds", 1)),
        given(("jobs", 4)),
        given(("rehearsal.per_class", 0)),
        given(("evaluation.batch_size", 250)),
        given(("method", {"name": "lamina", "rank": 32})),
    ]
    assert len({print_of(config) for config in same}) == 1
    others = [
        given(("seed", 1)),
        given(("training.lr", 2e-3)),
        given(("method.rank", 9)),
        given(("method.name", "finetune")),
        given(("data.augment", "none")),
        given(("data.columns.label", "y")),
        given(("backbone.blocks", [0])),
        given(("stream.tasks", 9)),
        given(("evaluation.split", "val")),
        given(("precision", "fp32")),
        given(("threads", 1)),
        given(("rehearsal.per_class", 10)),
        given(("rehearsal.per_class", 20)),
    ]
    assert len({print_of(config) for config in [*same, *others]}) == 1 + len(others)


def test_the_fingerprints_of_older_runs_stay():
    """Of runs that were made before `rehearsal` was a setting."""
    found = {name: print_of(given(("method.name", name), ("training.lr", 2e-3))) for name in ("color", "finetune")}
    assert found == {"color": "dec24bd2aefdc7dbffaa021da98c09e8", "finetune": "9cf39472f29ab3768b7a7afc98118b11"}


def test_a_run_is_named_after_its_method_and_what_sets_it_apart():
    assert given().name == "lamina"
    assert given(("method.name", "ewc"), ("rehearsal.per_class", 5)).name == "ewc-rehearsal"
    assert given(("method.name", "finetune"), ("stream.joint", True)).name == "finetune-joint"


def test_a_fingerprint_survives_the_file(tmp_path: Path):
    config = given(("training.lr", 1e-3), ("method.name", "inflora"), ("method.epsilon", 0.9))
    assert print_of(read(tmp_path, to_yaml(config))) == print_of(config)


class _Around(MethodConfig):
    around: ClassVar[Mapping[str, Any]] = {
        "consolidation.classifier": "lda",
        "consolidation.drift": "linear",
        "consolidation.layers": 4,
        "consolidation.class_covariance_rank": 16,
        "training.later_lr": 0.5,
    }


def test_a_method_can_have_defaults_around_it_which_what_is_said_overrides() -> None:
    def check(raw: dict[str, Any]) -> tuple[RunConfig | None, list[str]]:
        return configuration.check(raw, SETTINGS | {"lamina": _Around}, RunConfig)

    plain, _ = check({})
    assert plain is not None
    assert (plain.consolidation.classifier, plain.training.later_lr) == ("lda", 0.5)
    said, _ = check({"consolidation": {"classifier": "own"}})
    assert said is not None
    assert (said.consolidation.classifier, said.training.later_lr) == ("own", 0.5)
    section = said.consolidation
    assert (section.drift, section.layers, section.class_covariance_rank) == ("none", 1, 0), "of a unified classifier"
    other, _ = check({"method": "finetune"})
    assert other is not None
    assert other.consolidation.classifier == "own"
    assert check({"consolidation": 5})[1][0].startswith("consolidation = 5:")
    raw: dict[str, Any] = {"consolidation": {"merging": "ema"}}
    check(raw)
    assert raw == {"consolidation": {"merging": "ema"}}
