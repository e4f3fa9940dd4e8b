import math

import pytest
import torch

from ssl_core.training.monitor import Alarm, of_other_work, rankme, spread


def test_spread_is_one_on_the_sphere_and_zero_for_a_constant():
    torch.manual_seed(0)
    assert abs(spread(torch.randn(4096, 64)).item() - 1) < 0.01
    assert spread(torch.ones(16, 64)).item() < 1e-6


def test_rankme_counts_equal_directions():
    assert abs(rankme(torch.eye(5)).item() - 5) < 1e-3
    assert abs(rankme(torch.ones(16, 8)).item() - 1) < 1e-3


def test_a_constant_encoder_sets_off_the_alarm_at_the_third_look():
    alarm, value = Alarm(), spread(torch.ones(16, 64)).item()
    alarm.check(10, 1.0, value)
    alarm.check(20, 1.0, value)
    with pytest.raises(ValueError, match="collapsed: embeddings are nearly equal at step 30"):
        alarm.check(30, 1.0, value)


def test_a_collapse_only_warns_once_if_it_may_go_on(capsys):
    alarm = Alarm(stop_on_collapse=False)
    for step in range(5):
        alarm.check(step, 1.0, 0.0)
    assert capsys.readouterr().err.count("warning: training collapsed") == 1


def test_a_healthy_look_takes_the_alarm_back():
    alarm = Alarm()
    for step, value in enumerate([0.0, 0.0, 0.5, 0.0, 0.0]):
        alarm.check(step, 1.0, value)
    assert alarm.collapsed_looks == 2


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_the_run(loss):
    with pytest.raises(ValueError, match=f"diverged: the loss is {loss} at step 7"):
        Alarm().check(7, loss, 0.5)


@pytest.mark.parametrize(
    ("processor", "waited", "threads", "warned"),
    [(12.4, 0.0, 2, True), (19.2, 0.0, 2, False), (9.9, 0.0, 1, False), (4.0, 0.0, 1, False), (12.4, 1.0, 2, False)],
    ids=["two threads beside one process", "free", "one thread", "one thread beside four", "waiting for data"],
)
def test_other_work_is_noticed_where_threads_wait_for_each_other(processor, waited, threads, warned):
    message = of_other_work(processor, 10.0, waited, threads=threads)
    assert (message is not None) == warned
    assert not warned or str(message).startswith("other work takes 38% of the 2 cores of this training")
