"""fit: what it promises about determinism, resuming, stopping, errors and several processes."""

import json
import math
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from seqarch.training import History, NonFiniteLossError, fit


def line(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(3, 1)


def squared(model, batch):
    x, y = batch
    return (model(x) - y).pow(2).mean()


WEIGHTS = torch.tensor([[1.0], [-2.0], [0.5]])


def fresh(step, generator):
    x = torch.randn(32, 3, generator=generator)
    return x, x @ WEIGHTS


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_learns_a_linear_map():
    model = line()
    history = fit(model, squared, fresh, steps=300, lr=0.05, schedule="cosine", progress=False)
    assert history.last("loss") < 1e-3 * history.series("loss")[1][0]
    torch.testing.assert_close(model.weight.detach().T, WEIGHTS, atol=0.02, rtol=0)
    assert len(history.series("loss")[0]) == 300


def test_same_seed_same_run_and_other_seed_other_run():
    runs = [fit(line(), squared, fresh, steps=20, seed=s, progress=False).series("loss")[1] for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path):
    whole = line()
    history = fit(whole, squared, fresh, steps=30, lr=0.01, schedule="linear", warmup=5, progress=False)

    class Stop(Exception):
        pass

    def broken(model, batch):
        if broken.calls == 17:
            raise Stop
        broken.calls += 1
        return squared(model, batch)

    broken.calls = 0
    settings = dict(steps=30, lr=0.01, schedule="linear", warmup=5, progress=False, checkpoint=tmp_path / "run.pt")
    with pytest.raises(Stop):
        fit(line(), broken, fresh, checkpoint_every=10, **settings)
    resumed = line(seed=99)
    second = fit(resumed, squared, fresh, checkpoint_every=10, **settings)
    assert torch.equal(weights(whole), weights(resumed))
    assert second.series("loss") == history.series("loss")
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]  # nothing half-written is left


def test_resuming_a_list_of_batches_goes_on_where_it_was(tmp_path):
    batches = [fresh(0, torch.Generator().manual_seed(i)) for i in range(7)]
    whole, parts = line(), line()
    fit(whole, squared, batches, steps=20, progress=False)
    fit(parts, squared, batches, steps=11, checkpoint=tmp_path / "c.pt", progress=False)
    fit(parts, squared, batches, steps=20, checkpoint=tmp_path / "c.pt", progress=False)
    assert torch.equal(weights(whole), weights(parts))


def test_a_failed_save_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    fit(line(), squared, fresh, steps=2, checkpoint=path, progress=False)
    before = path.read_bytes()

    def full_disk(content, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError):
        fit(line(), squared, fresh, steps=4, checkpoint=path, progress=False)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_foreign_checkpoint_is_named(tmp_path):
    (tmp_path / "c.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"expected .*c\.pt to be a checkpoint of this model"):
        fit(line(), squared, fresh, steps=2, checkpoint=tmp_path / "c.pt", progress=False)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_loss_names_step_and_batch(bad):
    def poisoned(step, generator):
        x, y = fresh(step, generator)
        return (x, y * bad) if step == 3 else (x, y)

    with pytest.raises(NonFiniteLossError, match=r"at step 3 on batch \(32, 3\), \(32, 1\)"):
        fit(line(), squared, poisoned, steps=9, progress=False)


def test_clipping_bounds_the_step_and_records_the_norm():
    model = line()
    before = weights(model)
    history = fit(
        model, lambda m, b: 1e4 * squared(m, b), fresh, steps=1, clip=1.0,
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0), progress=False,
    )  # fmt: skip
    assert history.last("grad_norm") > 1
    assert math.isclose((weights(model) - before).norm(), 1.0, rel_tol=1e-4)


@pytest.mark.parametrize("schedule, last", [("constant", 1.0), ("linear", 0.1), ("cosine", 0.1)])
def test_learning_rate_schedule(schedule, last):
    rates = []

    def spy(parameters):
        spy.optimizer = torch.optim.SGD(parameters, lr=2.0)
        return spy.optimizer

    def loss(model, batch):
        rates.append(spy.optimizer.param_groups[0]["lr"] / 2.0)
        return 0.0 * squared(model, batch)

    fit(
        line(),
        loss,
        fresh,
        steps=20,
        optimizer=spy,
        schedule=schedule,
        warmup=4,
        final_lr=0.1,
        progress=False,
    )
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[-1] == pytest.approx(last)
    assert all(a >= b - 1e-9 for a, b in zip(rates[4:], rates[5:], strict=False))


def test_early_stop_restores_the_best_weights():
    values = iter([3.0, 1.0, 2.0, 2.5, 0.1])
    seen = []

    def evaluate(model):
        assert not model.training and not torch.is_grad_enabled()
        seen.append(weights(model))
        return {"error": next(values)}

    model = line()
    history = fit(
        model,
        squared,
        fresh,
        steps=50,
        evaluate=evaluate,
        eval_every=5,
        monitor="error",
        patience=2,
        progress=False,
    )
    assert history.series("error") == ([5, 10, 15, 20], [3.0, 1.0, 2.0, 2.5])
    assert torch.equal(weights(model), seen[1]) and model.training


def test_carried_state_is_detached_and_handed_on():
    states = []

    def loss(model, batch, state):
        states.append(state)
        h = model(batch[0]) + (0 if state is None else state["h"])
        return h.pow(2).mean(), {"h": h}

    fit(line(), loss, fresh, steps=3, carry=True, progress=False)
    assert states[0] is None and all(s["h"].grad_fn is None and s["h"].abs().sum() > 0 for s in states[1:])


def test_epochs_visit_every_batch_equally():
    batches = [(torch.full((2, 3), float(i)), torch.zeros(2, 1)) for i in range(4)]
    seen = []
    fit(
        line(),
        lambda m, b: (seen.append(int(b[0][0, 0])), squared(m, b))[1],
        batches,
        epochs=3,
        progress=False,
    )
    assert seen == [0, 1, 2, 3] * 3


def test_bfloat16_autocast_trains():
    history = fit(line(), squared, fresh, steps=100, lr=0.05, autocast=torch.bfloat16, progress=False)
    assert history.last("loss") < history.series("loss")[1][0] / 10


def test_history_is_a_tidy_table():
    history = History()
    history.add(1, loss=2.0, accuracy=0.5)
    history.add(2, loss=1.0)
    assert history.rows[0] == {"step": 1, "metric": "loss", "value": 2.0}
    assert history.best("loss") == 1.0 and history.best("accuracy", "max") == 0.5
    assert list(history.to_frame().columns) == ["step", "metric", "value"]
    with pytest.raises(KeyError, match="expected one of the metrics"):
        history.series("perplexity")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(), "expected either steps or epochs"),
        (dict(steps=1, epochs=1), "expected either steps or epochs"),
        (dict(steps=0), "expected steps >= 1, got 0"),
        (dict(epochs=2), "expected epochs with data of known length"),
        (
            dict(steps=1, schedule="step"),
            "expected schedule to be one of constant, linear, cosine, got 'step'",
        ),
        (dict(steps=1, mode="lowest"), "expected mode to be 'min' or 'max'"),
        (dict(steps=1, patience=2), "expected patience to come with evaluate and monitor"),
        (
            dict(steps=1, evaluate=lambda m: {"a": 1}, monitor="b", patience=1),
            r"expected evaluate to return 'b' for monitor, got \['a'\]",
        ),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        fit(line(), squared, fresh, progress=False, **arguments)


def test_empty_data_and_frozen_model():
    with pytest.raises(ValueError, match="at least one batch"):
        fit(line(), squared, [], steps=1, progress=False)
    with pytest.raises(ValueError, match="trainable parameters"):
        fit(line().requires_grad_(False), squared, fresh, steps=1, progress=False)


def test_two_processes_train_as_one(tmp_path):
    """Under torchrun, two gloo processes with half a batch each take the steps of one process with the whole batch."""
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import json, os, sys, torch
            from torch import nn
            from seqarch.training import fit

            rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
            torch.manual_seed(0)
            model = nn.Linear(3, 1)

            def batch(step, generator):
                x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
                y = x.sum(1, keepdim=True)
                return x[rank::world], y[rank::world]

            fit(model, lambda m, b: (m(b[0]) - b[1]).pow(2).mean(), batch, steps=12, lr=0.1, progress=False,
                optimizer=lambda p: torch.optim.SGD(p, lr=0.1), checkpoint=sys.argv[1] + ".pt")
            with open(f"{sys.argv[1]}.{rank}.json", "w") as file:
                json.dump([p.tolist() for p in model.parameters()], file)
            """
        )
    )
    run = dict(check=True, capture_output=True, timeout=240)
    subprocess.run([sys.executable, script, tmp_path / "one"], **run)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*torchrun, script, tmp_path / "two"], **run)
    one, first, second = (
        torch.tensor(sum((json.loads((tmp_path / name).read_text())[0]), []))
        for name in ("one.0.json", "two.0.json", "two.1.json")
    )
    torch.testing.assert_close(first, one)
    assert torch.equal(first, second)
    assert (tmp_path / "two.pt").exists()
