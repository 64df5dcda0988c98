"""The benchmark of growth on tiny models: every point is measured, and reported beside what the plan predicted."""

from pathlib import Path

from bench import growth
from bench.result import bench_result
from training.planning.hardware import Hardware

MACHINE = Hardware("a machine", bandwidth_gb_s=20.0, matmul_gflop_s=400.0, memory_gib=8.0)


def test_every_axis_and_every_model_is_measured_beside_its_plan(tmp_path: Path) -> None:
    found = growth.run_all(growth.TINY_SIZES, growth.QUICK_AXES, MACHINE, tmp_path)
    assert [(each.axis, each.x) for each in found[:2]] == [(axis, x) for axis in growth.QUICK_AXES for x in (1.0, 2.0)]
    assert len(found) == 4
    assert found[2].x < found[3].x
    for each in found:
        assert len(each.scoring) == len(each.update) == growth.NUM_ROUNDS - 1
        assert min(*each.seconds, each.predicted, each.scoring_share, each.update_share) > 0
    assert found[1].predicted > found[0].predicted
    growth.write_page(found, bench_result("growth", growth.figures(found)), tmp_path)
    page = (tmp_path / "growth.md").read_text()
    assert page.count(": predicted |") == 4
    assert (tmp_path / "growth.svg").stat().st_size > 5000
