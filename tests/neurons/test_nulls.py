"""Null vectors keep what they promise to keep, null peaks are calibrated, closed forms agree with draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from interp.neurons.nulls import covariance_null, expected_peak, peak_quantile, peak_statistics, rotation_null
from interp.stats import adjust_p_values


def _vectors(n: int = 40, d: int = 12, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) * torch.linspace(0.1, 3, n)[:, None] + 0.5


def _peaks(vectors: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    unit = torch.nn.functional.normalize
    return (unit(vectors, dim=1) @ unit(tokens, dim=1).T).max(1).values


class TestRotation:
    def test_keeps_norms_and_angles_and_moves_the_rest(self):
        vectors = _vectors()
        turned = rotation_null(vectors, seed=3)
        torch.testing.assert_close(turned @ turned.T, vectors @ vectors.T, atol=1e-4, rtol=1e-5)
        cosine = torch.nn.functional.cosine_similarity(turned, vectors, dim=1)
        assert cosine.abs().mean() < 0.5

    def test_depends_on_the_seed_alone(self):
        vectors = _vectors()
        assert torch.equal(rotation_null(vectors, seed=1), rotation_null(vectors, seed=1))
        assert not torch.equal(rotation_null(vectors, seed=1), rotation_null(vectors, seed=2))
        assert rotation_null(vectors.bfloat16()).dtype == torch.bfloat16

    def test_is_uniform(self):
        # QR alone, without the signs of R's diagonal, leaves the rotated first axis with a mean far from zero.
        axis = torch.eye(3)[:1]
        drawn = torch.cat([rotation_null(axis, seed=seed) for seed in range(800)])
        assert drawn.mean(0).abs().max() < 4 * (1 / 3 / 800) ** 0.5
        assert (drawn.T @ drawn / 800 - torch.eye(3) / 3).abs().max() < 0.06


class TestCovariance:
    def test_has_the_covariance_and_the_mean_of_the_vectors(self):
        mixing = torch.randn(5, 5, generator=torch.Generator().manual_seed(1))
        vectors = torch.randn(20_000, 5, generator=torch.Generator().manual_seed(2)) @ mixing + 2.0
        drawn, bare = covariance_null(vectors, seed=0), covariance_null(vectors, seed=0, mean="remove")
        scale = float(torch.cov(vectors.T).diagonal().max())
        assert (torch.cov(drawn.T) - torch.cov(vectors.T)).abs().max() < 0.05 * scale
        assert (drawn.mean(0) - vectors.mean(0)).abs().max() < 0.1
        torch.testing.assert_close(drawn - bare, vectors.mean(0).expand_as(bare), atol=1e-3, rtol=1e-3)
        assert not torch.allclose(covariance_null(vectors, seed=1), drawn)

    def test_stays_in_the_span_of_few_vectors(self):
        vectors = _vectors(4, 12)
        drawn = covariance_null(vectors, seed=0, mean="remove")
        assert torch.linalg.matrix_rank(drawn.double(), atol=1e-4) == 3

    def test_holds_what_a_layer_shares_where_the_rotation_does_not(self):
        # All neurons lean towards token 0: against the rotation they all stand out, against this null none does.
        generator = torch.Generator().manual_seed(5)
        tokens = torch.randn(60, 12, generator=generator)
        vectors = torch.randn(200, 12, generator=generator) + 5 * torch.nn.functional.normalize(tokens[0], dim=0)
        peaks = _peaks(vectors, tokens)
        turned = torch.cat([_peaks(rotation_null(vectors, seed), tokens) for seed in range(5)])
        drawn = torch.cat([_peaks(covariance_null(vectors, seed), tokens) for seed in range(5)])
        bare = torch.cat([_peaks(covariance_null(vectors, seed, mean="remove"), tokens) for seed in range(5)])
        found = {
            name: (adjust_p_values(peak_statistics(peaks, null).p, method="bh") < 0.05).mean()
            for name, null in {"rotation": turned, "covariance": drawn, "no mean": bare}.items()
        }
        assert found["rotation"] > 0.5
        assert found["no mean"] > 0.5
        assert found["covariance"] < 0.02


class TestPeakStatistics:
    def test_z_is_the_distance_in_standard_deviations(self):
        null = np.random.default_rng(0).normal(3, 2, 4000)
        z = peak_statistics(np.array([3.0, 7.0]), null).z
        np.testing.assert_allclose(z, (np.array([3.0, 7.0]) - null.mean()) / null.std(ddof=1))

    def test_p_counts_in_the_bulk_and_ties_count_as_large(self):
        null = np.arange(100.0)
        p = peak_statistics(np.array([-1.0, 0.0, 50.0]), null).p
        np.testing.assert_allclose(p, [1.0, 1.0, 51 / 101])
        np.testing.assert_allclose(peak_statistics(np.array([500.0]), null, tail="empirical").p, [1 / 101])

    def test_the_tail_of_an_exponential_null_is_right(self):
        null = np.random.default_rng(0).exponential(size=20_000)
        p = peak_statistics(np.array([5.0, 8.0]), null).p
        np.testing.assert_allclose(np.log(p), [-5, -8], atol=0.6)

    def test_p_never_rises_with_the_peak(self):
        rng = np.random.default_rng(1)
        p = peak_statistics(np.linspace(-1, 6, 500), rng.normal(size=300)).p
        assert (np.diff(p) <= 1e-12).all()

    def test_peaks_of_null_vectors_are_rarely_significant(self):
        # Independent vectors: the share of p below a level is at most that level, also far out in the fitted tail.
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randn(300, 24, generator=generator)
        null = _peaks(torch.randn(2000, 24, generator=generator), tokens)
        fresh = _peaks(torch.randn(40_000, 24, generator=generator), tokens)
        p = peak_statistics(fresh, null).p
        for level in (0.3, 0.05, 0.01, 0.001, 0.0001):
            assert (p < level).mean() <= level * 1.25 + 1e-5
        assert (p < 0.3).mean() > 0.25

    def test_one_planted_vector_survives_the_correction_over_thousands(self):
        # Counting cannot do this: 1 / (n + 1) times the number of vectors is above 0.05.
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randn(300, 32, generator=generator)
        vectors = torch.randn(3000, 32, generator=generator)
        vectors[7] = tokens[11] + 0.1 * vectors[7]
        peaks, null = _peaks(vectors, tokens), _peaks(rotation_null(vectors, 1), tokens)
        fitted = adjust_p_values(peak_statistics(peaks, null).p, method="bh")
        counted = adjust_p_values(peak_statistics(peaks, null, tail="empirical").p, method="bh")
        assert (fitted < 0.05).nonzero()[0].tolist() == [7]
        assert (counted > 0.05).all()

    def test_groups_have_nulls_of_their_own(self):
        rng = np.random.default_rng(0)
        peaks, null = rng.normal(size=(2, 5)), rng.normal(size=(2, 50)) + np.array([[0.0], [9.0]])
        both = peak_statistics(torch.tensor(peaks), null)
        for layer in range(2):
            alone = peak_statistics(peaks[layer], null[layer])
            np.testing.assert_allclose(both.z[layer], alone.z)
            np.testing.assert_allclose(both.p[layer], alone.p)

    def test_equal_largest_null_peaks_fall_back_to_counting(self):
        null = np.concatenate([np.zeros(50), np.ones(50)])
        np.testing.assert_allclose(peak_statistics(np.array([2.0]), null).p, [1 / 101])


class TestClosedForms:
    def test_published_sizes(self):
        assert expected_peak(4096, 128_256) == pytest.approx(0.076, abs=5e-4)
        assert expected_peak(4096, 128_256, 458_752) == pytest.approx(0.110, abs=5e-4)
        assert expected_peak(64, 153) == pytest.approx(0.40, abs=5e-3)
        assert expected_peak(2, 10**6) == 1.0

    @pytest.mark.parametrize("absolute", [False, True])
    @pytest.mark.parametrize(("d_model", "d_vocab"), [(3, 2), (16, 50), (64, 400)])
    def test_quantiles_are_those_of_draws(self, d_model, d_vocab, absolute):
        rng = np.random.default_rng(0)
        # by symmetry the other direction may be fixed: a cosine is one coordinate of a random unit vector
        draws = rng.normal(size=(4000, d_vocab))
        rest = rng.chisquare(d_model - 1, size=(4000, d_vocab))
        cosines = draws / np.sqrt(draws**2 + rest)
        largest = (np.abs(cosines) if absolute else cosines).max(1)
        for q in (0.1, 0.5, 0.95):
            below = (largest < peak_quantile(q, d_model, d_vocab, absolute=absolute)).mean()
            assert below == pytest.approx(q, abs=0.03)

    def test_a_single_cosine_may_have_a_negative_quantile(self):
        assert peak_quantile(0.5, 10, 1) == pytest.approx(0, abs=1e-6)
        assert peak_quantile(0.1, 10, 1) == pytest.approx(-peak_quantile(0.9, 10, 1))

    def test_the_simple_form_lies_above_the_exact_median(self):
        for d_model, d_vocab in ((64, 153), (128, 1340), (768, 50_257), (4096, 128_256)):
            exact = peak_quantile(0.5, d_model, d_vocab)
            assert exact < expected_peak(d_model, d_vocab) < 1.35 * exact
        assert peak_quantile(0.5, 4096, 128_256, 458_752) > peak_quantile(0.5, 4096, 128_256)


class TestErrors:
    def test_vectors(self):
        bad = _vectors()
        bad[3, 2] = torch.nan
        for null in (rotation_null, covariance_null):
            with pytest.raises(ValueError, match="1 of 40 vectors"):
                null(bad)
        with pytest.raises(ValueError, match="1 vector has no covariance"):
            covariance_null(_vectors(1))

    def test_peaks(self):
        null = np.arange(50.0)
        with pytest.raises(ValueError, match="19 null peaks; at least 20"):
            peak_statistics(null, null[:19])
        with pytest.raises(ValueError, match=r"peaks hold 1 values that are NaN"):
            peak_statistics([1.0, np.nan], null)
        with pytest.raises(ValueError, match=r"groups \(2,\) and null_peaks \(\)"):
            peak_statistics(np.zeros((2, 5)), null)
        with pytest.raises(ValueError, match="all null peaks of a group are equal"):
            peak_statistics(null, np.ones(50))
        with pytest.raises(ValueError, match=r"shape \(0,\)"):
            peak_statistics([], null)

    def test_closed_forms(self):
        with pytest.raises(ValueError, match="q must lie between 0 and 1, got 95"):
            peak_quantile(95, 10, 10)
        with pytest.raises(ValueError, match="d_model 1"):
            expected_peak(1, 10)

    def test_options(self, unchecked):
        with pytest.raises(ValueError, match="'keep' or 'remove', got 'both'"):
            covariance_null(_vectors(), mean="both")  # pyright: ignore
        with pytest.raises(ValueError, match="got 'pareto'"):
            peak_statistics(np.arange(50.0), np.arange(50.0), tail="pareto")  # pyright: ignore
