import dataclasses
import math
import re

import numpy as np
import pytest

from gradclip import records, theory
from gradclip.experiments import worst_case
from gradclip.experiments.worst_case import Config, run

SMOKE = Config.profile("smoke")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return run(SMOKE, tmp_path_factory.mktemp("records"))


def test_the_smoke_profile_gives_a_whole_record(smoke):
    assert (smoke.experiment, smoke.profile) == ("worst-case", "smoke")
    assert records.is_current(smoke)
    assert smoke.config["sizes"] == [1.0, math.inf]
    assert smoke.series["u"].tolist() == [1.0] * SMOKE.points + [math.inf] * SMOKE.points
    assert smoke.scalars["check.cases"] == 2
    assert not any(np.isnan(column).any() for column in smoke.series.values())


def test_every_documented_key_is_there_and_every_key_is_documented(smoke):
    tables = [block for block in worst_case.__doc__.split("\n\n") if block.startswith("====")]
    columns, keys = ([re.match(r"``(.+?)``", row)[1] for row in t.splitlines()[3:-1]] for t in tables)
    assert list(smoke.series) == columns
    names = "|".join(columns[columns.index("turn") :])
    patterns = [re.escape(key).replace("U", r"(1|inf)").replace("NAME", f"({names})") for key in keys]
    patterns = [r"zero\.(0\.5|1|1\.5|2|3|4)" if p == r"zero\.R" else p for p in patterns]
    for pattern in patterns:
        assert any(re.fullmatch(pattern, key) for key in smoke.scalars), pattern
    assert [key for key in smoke.scalars if not re.fullmatch("|".join(patterns), key)] == []


def test_bounds_are_in_their_order(smoke):
    s = smoke.series
    # Three paths per factor of ten interpolate to 1e-2 of values up to 30.
    assert (s["exact_1d"] <= s["attained"] + 1e-12).all()
    assert (s["attained"] <= s["worst"] + 0.02 * (1 + np.abs(s["worst"]))).all()
    assert (s["worst"] <= s["phi"] + 1e-9).all()
    turned = s["step"] > s["turn"]
    np.testing.assert_array_equal(s["worst"][~turned], s["exact_1d"][~turned])
    for low, high in (
        ("turn", "best"),
        ("best", "best_most"),
        ("limit", "limit_most"),
        ("half", "half_most"),
    ):
        assert (s[low] <= s[high]).all()
    assert (s["decrease"] <= s["ceiling"] + 1e-12).all()


def test_scalars_are_those_of_the_series(smoke):
    for label, u in (("1", 1.0), ("inf", math.inf)):
        row = {name: column[smoke.series["u"] == u][0] for name, column in smoke.series.items()}
        for name in ("turn", "best", "limit", "half", "half_most"):
            assert smoke.scalars[f"at.{label}.{name}"] == row[name]
    # u = 1 is below the critical size: the best step and its decrease are those of one dimension.
    step = theory.exact_step_1d(1.0, 0.5, 0.5)
    assert smoke.scalars["at.1.best"] == pytest.approx(float(step), rel=1e-12)
    assert smoke.scalars["at.1.decrease"] == pytest.approx(
        -theory.exact_bound_1d(1.0, step, 0.5, 0.5), rel=1e-12
    )
    assert smoke.scalars["at.1.ceiling"] == smoke.scalars["at.1.decrease"]
    assert smoke.scalars["half.least"] == smoke.series["half"].min()
    # S7 at L0 = 0: 1 - 1/e against the two ends of the best decrease.
    kept = (1 - 1 / math.e) / smoke.scalars["at.inf.ceiling"]
    assert smoke.scalars["kept.least"] == pytest.approx(kept, rel=1e-12)


def test_the_solvers_agree_within_their_error_bars(smoke):
    for name in ("transcribed", "grid"):
        # The bars are differences to a discretisation twice as coarse.
        assert smoke.scalars[f"check.{name}"] <= 2 * smoke.scalars[f"check.{name}_bar"]
    assert smoke.scalars["check.hamiltonian"] <= 1e-7


def test_a_finished_record_is_read_and_not_made_again(tmp_path, monkeypatch, smoke):
    records.save(smoke, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(worst_case.tightness, "worst_curve", None)
        assert run(SMOKE, tmp_path).scalars == smoke.scalars
        with pytest.raises(TypeError):  # another configuration is another computation
            run(dataclasses.replace(SMOKE, density=4), tmp_path)


def test_an_unknown_profile_is_named():
    with pytest.raises(ValueError, match="got 'huge'"):
        Config.profile("huge")
