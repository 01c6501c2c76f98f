"""Cut between any two TPM commands, or the TPM reset there: a sample of what `./dev fuzz anchors` does with all."""

import pytest
from anchor_cuts import Cuts, all_cuts, commands_of_a_run, life, wired_tpm


@pytest.mark.parametrize(("strict", "step"), [(False, 7), (True, 13)])
async def test_nothing_old_is_accepted_and_nothing_locked_out_wherever_it_is_cut(strict: bool, step: int) -> None:
    found = Cuts()
    with wired_tpm() as tpm:
        await all_cuts(tpm, found, strict=strict, step=step, first=1)
    assert (found.accepted_old, found.locked_out, found.lost_saves) == ([], [], [])
    assert found.lives >= 12
    assert min(found.cut, found.resets) > 3
    assert found.refused > 500
    assert found.cut_logs > 10


async def test_control_a_counter_fails_the_same_test() -> None:
    found = Cuts()
    with wired_tpm() as tpm:
        places = await commands_of_a_run(tpm, strict=False)
        for place in range(places // 2, places, 3):
            await life(tpm, place, found, counter=True, cut_at=place)
            if found.accepted_old:
                return
    pytest.fail("the adversary found no fork")
