"""A linear probe: the accuracy of a linear classifier on fixed features.

Features are normalised by mean and standard deviation of the training features. This is what a batch norm without
parameters does in MAE's protocol (arXiv 2111.06377, appendix A.1), which GigaTok follows. The classifier is multinomial
logistic regression by L-BFGS: the problem is convex, so the score depends on no schedule. Every fifth training sample
is held out to choose among ``STRENGTHS``, by the likelihood of its label; then all training samples are fitted.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
"""Candidates for scikit-learn's C, the inverse of the penalty's weight."""
EPS = 1e-6
MOST_ITERATIONS = 200


def linear_probe(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> dict[str, Any]:
    """Fit a linear classifier to the training features and score it on the test features.

    Args:
        train, test: features (N, D) and (M, D).
        train_labels, test_labels: classes (N,) and (M,).

    Returns:
        ``accuracy`` on the test features, in [0, 1], ``channels`` D, ``penalty`` (the chosen C of ``STRENGTHS``), and
        the numbers of samples ``fitted`` N and ``scored`` M.

    Raises:
        ValueError: there are fewer than two classes or ten samples, or features are not finite.
    """
    if len(train) < 10 or len(train_labels.unique()) < 2:
        raise ValueError(
            f"a linear probe needs at least ten samples of at least two classes, got {len(train)} of "
            f"{len(train_labels.unique())}"
        )
    if not (train.isfinite().all() and test.isfinite().all()):
        raise ValueError("the features are not finite; is the model trained?")
    mean, variance = train.double().mean(0), train.double().var(0, correction=0)
    x, y = ((part.double() - mean) / (variance + EPS).sqrt() for part in (train, test))
    held_out = torch.arange(len(x)) % 5 == 4
    kept, judged = (x[~held_out], train_labels[~held_out]), (x[held_out], train_labels[held_out])
    best = STRENGTHS[-1]  # scikit-learn's own; the few samples of a quick try may not tell penalties apart
    if len(kept[1].unique()) > 1 and torch.isin(judged[1], kept[1]).any():
        best = max(STRENGTHS, key=lambda strength: _likelihood(_fit(*kept, strength), *judged))
    accuracy = float(_fit(x, train_labels, best).score(y.numpy(), test_labels.numpy()))
    return {"accuracy": accuracy, "channels": x.shape[1], "penalty": best, "fitted": len(x), "scored": len(y)}


def _fit(x: Tensor, labels: Tensor, strength: float) -> LogisticRegression:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=strength, max_iter=MOST_ITERATIONS, tol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # by the last iteration, accuracies no longer change
        return model.fit(x.numpy(), labels.numpy())


def _likelihood(model: LogisticRegression, x: Tensor, labels: Tensor) -> float:
    """The mean log-probability of the labels; samples of classes that the model was not fitted to are left out."""
    known = torch.isin(labels, torch.from_numpy(model.classes_))
    columns = torch.searchsorted(torch.from_numpy(model.classes_), labels[known])
    logs = torch.from_numpy(model.predict_log_proba(x[known].numpy()))
    return float(logs.gather(1, columns[:, None]).mean())
