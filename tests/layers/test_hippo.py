"""The HiPPO matrices: entries, stability, the same system in two coordinates, and what they remember."""

import pytest
import torch

from seqarch.layers.hippo import MEASURES, hippo, nplr


def test_entries_written_out():
    A, B = hippo("legs", 4)
    want = torch.tensor([-2.6458, -4.5826, -5.9161, -4.0], dtype=torch.float64)
    torch.testing.assert_close(A[3], want, rtol=0, atol=5e-5)
    assert A[0].tolist() == [-1, 0, 0, 0]
    torch.testing.assert_close(B**2, torch.tensor([1, 3, 5, 7], dtype=torch.float64))
    A, _ = hippo("legt", 3)
    torch.testing.assert_close(A[0], -torch.tensor([1, -(3**0.5), 5**0.5], dtype=torch.float64))
    torch.testing.assert_close(A[2], -(5**0.5) * torch.tensor([1, 3**0.5, 5**0.5], dtype=torch.float64))
    A, B = hippo("lagt", 3)
    assert A.tolist() == [[-0.5, 0, 0], [-1, -0.5, 0], [-1, -1, -0.5]] and B.tolist() == [1, 1, 1]
    A, B = hippo("lmu", 3)
    assert A.tolist() == [[-1, -1, -1], [3, -3, -3], [-5, 5, -5]] and B.tolist() == [1, -3, 5]


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("N", [1, 2, 7, 32])
def test_shapes_dtype_and_stability(measure, N):
    A, B = hippo(measure, N)
    assert A.shape == (N, N) and B.shape == (N,) and A.dtype == B.dtype == torch.float64
    assert torch.linalg.eigvals(A).real.max() < 0


@pytest.mark.parametrize("N", [1, 5, 12])
def test_lmu_is_legt_in_other_coordinates(N):
    n = torch.arange(N, dtype=torch.float64)
    s = (-1) ** n / (2 * n + 1).sqrt()
    A, B = hippo("lmu", N)
    want_A, want_B = hippo("legt", N)
    torch.testing.assert_close(s[:, None] * A / s, want_A, rtol=0, atol=1e-12)
    torch.testing.assert_close(s * B, want_B, rtol=0, atol=1e-12)


def test_legs_impulse_response_is_the_legendre_polynomials_with_a_fading_weight():
    A, B = hippo("legs", 4)
    for s in (0.0, 0.3, 2.0):
        z = 2 * torch.tensor(-s, dtype=torch.float64).exp() - 1
        P = torch.stack([z**0, z, (3 * z**2 - 1) / 2, (5 * z**3 - 3 * z) / 2])
        want = B * P * (z + 1) / 2
        torch.testing.assert_close(torch.linalg.matrix_exp(s * A) @ B, want, rtol=0, atol=1e-12)


def test_errors():
    with pytest.raises(ValueError, match="expected measure to be one of legs, legt, lagt, lmu, got 'fourier'"):
        hippo("fourier", 4)
    for N in (0, 2.0):
        with pytest.raises(ValueError, match="expected N to be an integer of at least 1"):
            hippo("legs", N)


@pytest.mark.parametrize("measure, rank, real", [("legs", 1, -0.5), ("legt", 2, 0.0), ("lagt", 1, 0.0)])
@pytest.mark.parametrize("N", [1, 2, 7, 64])
def test_normal_plus_low_rank_is_the_same_matrix(measure, rank, real, N):
    A, B = hippo(measure, N)
    lam, P, rotated, V = nplr(measure, N)
    assert lam.shape == (N,) and P.shape == (rank, N) and rotated.shape == (N,) and V.shape == (N, N)
    assert all(x.dtype == torch.complex128 for x in (lam, P, rotated, V))
    eye = torch.eye(N, dtype=torch.complex128)
    torch.testing.assert_close(V.mH @ V, eye, rtol=0, atol=1e-12)
    back = V @ (torch.diag(lam) - torch.einsum("rn,rm->nm", P, P.conj())) @ V.mH
    torch.testing.assert_close(back, A.to(back.dtype), rtol=0, atol=1e-10)
    torch.testing.assert_close(V @ rotated, B.to(back.dtype), rtol=0, atol=1e-10)
    torch.testing.assert_close(lam.real, torch.full((N,), real, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (lam.imag.diff() > 0).all() and (lam.imag + lam.imag.flip(0)).abs().max() < 1e-9
    if N % 2 == 0:
        assert (lam.imag[N // 2 :] > 0).all()


def test_four_eigenvalues_of_legs_written_out():
    want = torch.tensor([-4.6033, -0.5565, 0.5565, 4.6033], dtype=torch.float64)
    torch.testing.assert_close(nplr("legs", 4)[0].imag, want, rtol=0, atol=5e-5)


def test_nplr_errors():
    with pytest.raises(ValueError, match="expected measure to be one of legs, legt, lagt, got 'lmu'"):
        nplr("lmu", 4)
    with pytest.raises(ValueError, match="expected N to be an integer of at least 1, got 0"):
        nplr("legs", 0)
