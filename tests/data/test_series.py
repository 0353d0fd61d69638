"""Weather windows, event sequences and recorded episodes: what they promise, and that it is so."""

import pytest
import torch

from seqarch.data import control, weather
from seqarch.data.control import controller, point_mass_offline, point_mass_starts, point_mass_step, rollout
from seqarch.data.events import hawkes_sequences, poisson_nll
from seqarch.data.weather import jfk_weather_windows


class TestWeather:
    def test_sizes_and_finite_values(self):
        w = jfk_weather_windows()
        hours = len(weather._hours())
        cut = int(0.7 * hours)
        assert w.train_x.shape == (cut - 71, 48, 5) and w.train_y.shape == (cut - 71, 24)
        assert w.test_x.shape == (hours - cut - 71, 48, 5) and w.test_y.shape == (hours - cut - 71, 24)
        assert all(torch.isfinite(x).all() for x in (w.train_x, w.train_y, w.test_x, w.test_y))
        assert len(w.columns) == len(w.units) == 5 and w.columns[0] == "temp"

    def test_the_hours_of_2013_are_complete_and_none_is_skipped(self):
        assert len(weather._hours()) == 8706 + 24  # rows of the table, and the hours that it skips

    def test_targets_are_the_temperatures_that_follow(self):
        w = jfk_weather_windows(inputs=5, horizon=3)
        torch.testing.assert_close(w.train_x[3:, 4, 0], w.train_y[:-3, 2])
        torch.testing.assert_close(w.train_x[1:, 4, 0], w.train_y[:-1, 0])

    def test_units_come_back(self):
        w = jfk_weather_windows(inputs=1, horizon=1)
        first = weather._hours()[0]
        torch.testing.assert_close(w.train_x[0, 0] * w.std + w.mean, torch.tensor(first).float(), rtol=1e-4, atol=1e-3)
        assert -10 < first[0] < 110 and 900 < first[3] < 1100

    def test_no_window_crosses_the_cut_and_statistics_come_from_training_alone(self):
        w = jfk_weather_windows(inputs=4, horizon=2)
        hours = torch.tensor(weather._hours())
        cut = int(0.7 * len(hours))
        torch.testing.assert_close(w.mean.double(), hours[:cut].mean(0), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(w.train_y[-1, -1] * w.std[0] + w.mean[0], hours[cut - 1, 0].float())
        torch.testing.assert_close(w.test_x[0, 0, 0] * w.std[0] + w.mean[0], hours[cut, 0].float())

    def test_a_missing_value_is_filled_from_the_past(self):
        """The record of pressure has holes: filled hours repeat the hour before, so no window sees the future."""
        pressure = torch.tensor(weather._hours()[:, 3])
        assert (pressure.diff() == 0).float().mean() > 0.05

    @pytest.mark.parametrize("sizes", [(0, 24), (48, 0), (3000, 24)])
    def test_errors(self, sizes):
        with pytest.raises(ValueError, match="expected inputs and horizon of at least 1 and together at most"):
            jfk_weather_windows(*sizes)
        with pytest.raises(ValueError, match="expected train_fraction between 0 and 1, got 1.5"):
            jfk_weather_windows(train_fraction=1.5)


class TestEvents:
    def test_the_same_seed_gives_the_same_sequences(self):
        a, b, c = hawkes_sequences(5, 10, seed=1), hawkes_sequences(5, 10, seed=1), hawkes_sequences(5, 10, seed=2)
        assert torch.equal(a.gaps, b.gaps) and torch.equal(a.marks, b.marks) and torch.equal(a.nll, b.nll)
        assert not torch.equal(a.gaps, c.gaps)

    def test_likelihood_is_the_sum_over_the_whole_history(self):
        """Recompute with explicit sums over past events, as in the definition of the intensity."""
        e = hawkes_sequences(3, 12, seed=4)
        for gaps, marks, nll in zip(e.gaps.double(), e.marks, e.nll, strict=True):
            times = gaps.cumsum(0)
            for i in range(12):
                start, past = (times[i - 1] if i else torch.tensor(0.0)), times[:i]
                rate = 0.2 + 0.8 * torch.exp(-(times[i] - past)).sum()
                integral = 0.2 * gaps[i] + 0.8 * (torch.exp(-(start - past)) - torch.exp(-(times[i] - past))).sum()
                chance = 0.5 if i == 0 else (0.8 if marks[i] == marks[i - 1] else 0.2)
                want = integral - rate.log() - torch.tensor(chance).log()
                torch.testing.assert_close(nll[i].double(), want, rtol=1e-4, atol=1e-4)

    def test_rescaled_times_are_exponential(self):
        """The integral of the rate between events is Exp(1) if the sampler is right (the time-rescaling theorem)."""
        e = hawkes_sequences(400, 50, seed=0, stay=0.5)
        gaps, excitation, integrals = e.gaps.double(), torch.zeros(400, dtype=torch.float64), []
        for i in range(50):
            decayed = excitation * torch.exp(-gaps[:, i])
            integrals.append(0.2 * gaps[:, i] + excitation - decayed)
            excitation = decayed + 0.8
        z = torch.stack(integrals).flatten().sort().values
        uniform = 1 - torch.exp(-z)
        distance = (uniform - torch.arange(1, len(z) + 1) / len(z)).abs().max()
        assert distance < 1.63 / len(z) ** 0.5  # Kolmogorov-Smirnov at the 1% level

    def test_marks_repeat_as_often_as_asked(self):
        e = hawkes_sequences(400, 50, seed=0)
        assert abs((e.marks[:, 1:] == e.marks[:, :-1]).float().mean() - 0.8) < 0.01
        assert abs(e.marks.float().mean() - 0.5) < 0.03

    def test_knowing_the_process_beats_ignoring_its_history(self):
        train, test = hawkes_sequences(200, seed=0), hawkes_sequences(200, seed=1)
        assert test.nll.mean() < poisson_nll(train, test).mean() - 0.5

    def test_without_excitation_it_is_a_poisson_process(self):
        e = hawkes_sequences(400, 50, alpha=0.0, mu=2.0, seed=0)
        assert abs(e.gaps.mean() - 0.5) < 0.01
        torch.testing.assert_close(e.nll.mean(), poisson_nll(e, e).mean(), rtol=0, atol=0.25)

    @pytest.mark.parametrize("bad", [dict(mu=0.0), dict(alpha=1.5), dict(stay=1.0)])
    def test_errors(self, bad):
        with pytest.raises(ValueError, match="expected mu > 0, 0 <= alpha < beta and 0 < stay < 1, got"):
            hawkes_sequences(1, 5, **bad)
        with pytest.raises(ValueError, match="expected sequences and events of at least 1, got 0 and 5"):
            hawkes_sequences(0, 5)


class TestControl:
    def test_one_step_by_hand(self):
        state, reward = point_mass_step(torch.tensor([[1.0, 0.5]]), torch.tensor([0]))
        torch.testing.assert_close(state, torch.tensor([[1.35, 0.35]]))
        torch.testing.assert_close(reward, torch.tensor([-1.35]))

    def test_controller_pushes_home_and_rests_there(self):
        state = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.04, 0.0], [0.3, -0.1]])
        assert controller(state).tolist() == [0, 2, 1, 1]

    def test_recordings_follow_the_world(self):
        e = point_mass_offline(50, torch.Generator().manual_seed(0))
        assert e.states.shape == (50, control.STEPS, 2) and e.actions.shape == e.rewards.shape == (50, control.STEPS)
        for t in range(control.STEPS - 1):
            following, reward = point_mass_step(e.states[:, t], e.actions[:, t])
            torch.testing.assert_close(following, e.states[:, t + 1])
            torch.testing.assert_close(reward, e.rewards[:, t])
        assert (e.states[:, 0, 0].abs() <= 2).all() and (e.states[:, 0, 1] == 0).all()

    def test_returns(self):
        e = point_mass_offline(5)
        torch.testing.assert_close(e.returns_to_go[:, 0], e.returns)
        torch.testing.assert_close(e.returns_to_go[:, :-1] - e.returns_to_go[:, 1:], e.rewards[:, :-1])

    def test_quality_is_mixed_and_reproducible(self):
        e, again = point_mass_offline(300), point_mass_offline(300)
        assert torch.equal(e.actions, again.actions)
        agree = (e.actions == controller(e.states.flatten(0, 1)).view(300, -1)).float().mean(1)
        assert agree.min() < 0.4 and agree.max() == 1.0

    def test_the_controller_beats_chance_by_far(self):
        g = torch.Generator().manual_seed(0)
        starts = point_mass_starts(200, g)
        best = rollout(lambda t, s, r: controller(s), starts).returns.mean()
        chance = rollout(lambda t, s, r: torch.randint(3, (200,), generator=g), starts).returns.mean()
        assert best > chance + 5

    def test_error(self):
        with pytest.raises(ValueError, match="expected episodes of at least 1, got 0"):
            point_mass_offline(0)
