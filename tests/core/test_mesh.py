"""One table for all backends: the parts that a mesh splits parameters and rows into."""

from typing import Any

import pytest

from opt_core.config import OPTConfig
from opt_core.errors import ConfigError
from opt_core.mesh import (
    RULES,
    check_count,
    check_sizes,
    chunk,
    parse_mesh,
    row_axes,
    split_axes,
)
from opt_core.params import param_specs
from opt_core.training.lora import adapter_specs

CONFIG = OPTConfig.from_preset("opt-350m")


def test_sizes_are_read_from_the_command_line():
    assert parse_mesh("model=8") == {"data": 1, "fsdp": 1, "model": 8}
    assert parse_mesh("data=2, fsdp=4,model=1") == {"data": 2, "fsdp": 4, "model": 1}


@pytest.mark.parametrize("text", ["", "8", "tensor=2", "model=0", "model=2,model=2", "model=2.0"])
def test_what_names_no_mesh_is_refused(text):
    with pytest.raises(ConfigError, match=r"^mesh: expected sizes such as data=2,.*received"):
        parse_mesh(text)


def test_a_mesh_has_as_many_devices_as_its_sizes_say():
    sizes = check_sizes(2, 1, 4)
    assert check_count(sizes, 8, is_exact=True) == 8
    assert check_count(sizes, 9, is_exact=False) == 8
    for found, is_exact in ((9, True), (7, False)):
        with pytest.raises(ConfigError, match=rf"data=2 x .* needs 8 devices, received {found}$"):
            check_count(sizes, found, is_exact)
    wrong: Any = 2.0
    with pytest.raises(ConfigError, match=r"integers of at least 1, received data=1 x fsdp=2\.0"):
        check_sizes(1, wrong, 1)


def test_every_logical_axis_has_its_place():
    specs = [spec for head in ("causal_lm", "question_answering", "sequence_classification")
             for spec in param_specs(CONFIG, head)]  # fmt: skip
    specs += adapter_specs(CONFIG, 8, ("q_proj", "fc2"))
    assert {axis for spec in specs for axis in spec.axes} == RULES.keys()


def test_dimensions_are_split_where_they_can_be():
    sizes = {"data": 2, "fsdp": 2, "model": 4}
    specs = {spec.name.rpartition("layers.0.")[2]: spec for spec in param_specs(CONFIG)}
    for name, expected in (
        ("fc1.weight", ("model", "fsdp")),
        ("fc2.weight", ("fsdp", "model")),
        ("self_attn.q_proj.bias", ("model",)),
        ("model.decoder.embed_tokens.weight", ("model", "fsdp")),
        # Each axis once: opt-350m's projections have two dimensions that "fsdp" could split.
        ("model.decoder.project_in.weight", ("fsdp", None)),
    ):
        assert split_axes(specs[name], CONFIG, sizes) == expected, name
    # 16 heads are not 32 halves; the vocabulary is split whatever its size.
    many = {"data": 1, "fsdp": 3, "model": 32}
    assert split_axes(specs["self_attn.q_proj.weight"], CONFIG, many) == (None, None)
    assert split_axes(specs["fc1.weight"], CONFIG, many) == ("model", None)
    assert split_axes(specs["model.decoder.embed_tokens.weight"], CONFIG, many) == ("model", None)


def test_rows_are_split_by_what_divides_them():
    sizes = {"data": 2, "fsdp": 4, "model": 2}
    found = [row_axes(rows, sizes) for rows in (16, 4, 6, 3)]
    assert found == [("data", "fsdp"), ("data",), ("data",), ()]
    assert row_axes(4, {"data": 3, "fsdp": 4, "model": 1}) == ("fsdp",)


@pytest.mark.parametrize(("size", "ways"), [(99, 2), (99, 8), (7, 4), (2, 4), (8, 4)])
def test_chunks_cover_a_dimension_once(size, ways):
    numbers = [n for index in range(ways) for n in range(size)[chunk(size, ways, index)]]
    assert numbers == list(range(size))
    longest = [len(range(size)[chunk(size, ways, index)]) for index in range(ways)]
    assert longest == sorted(longest, reverse=True)
