"""Few-shot classification of features by regularised least squares, in closed form."""

import numpy as np

SHOTS = (1, 5, 10, 25)
SEEDS = (0, 1, 2)
L2 = 2.0**10
BIAS = 100.0  # a constant feature so large that the penalty hardly acts on its weights


def few_shot_accuracies(train, test, num_classes):
    """Accuracies after a few training images of each class, which are drawn three times.

    With the drawn features X, standardised by their own mean and deviation and extended by a
    constant, and Y their labels as one-hot vectors of -1 and 1,

        W = (X^T X + 2^10 I)^-1 X^T Y;    the class of x is argmax(x W).

    Args:
        train: Features `(N, D)` and int labels `(N,)` in [0, K) to draw from.
        test: Features `(M, D)` and labels `(M,)` to report on.
        num_classes: Number K of classes.

    Returns:
        A dict: images per class, of 1, 5, 10 and 25 those that every class has -> the accuracies
        of the draws with seeds 0, 1 and 2. The same arguments give the same accuracies.

    Source: google-research/big_vision, evaluators/fewshot_lsr.py, with the shots, the L2 and the
    number of seeds of configs/common_fewshot.py; L2 is fixed there too, not chosen. Differences:
    float64 instead of float32, the pooled features instead of those of a `pre_logits` layer where
    there is one, and a number of shots that a class does not have is left out instead of taking
    what there is.
    """
    features, labels = train
    test_features, test_labels = test
    fewest = np.bincount(labels, minlength=num_classes).min()
    accuracies = {}
    for shots in (shots for shots in SHOTS if shots <= fewest):
        accuracies[shots] = []
        for seed in SEEDS:
            drawn = draw(labels, num_classes, shots, seed)
            predicted = least_squares(features[drawn], labels[drawn], test_features, num_classes)
            accuracies[shots].append(float(np.mean(predicted == test_labels)))
    return accuracies


def draw(labels, num_classes, shots, seed):
    """Indices of `shots` images of each class; with the same seed, more shots add to fewer."""
    random = np.random.default_rng(seed)
    by_class = [random.permutation(np.flatnonzero(labels == c)) for c in range(num_classes)]
    return np.concatenate([indices[:shots] for indices in by_class])


def least_squares(features, labels, test_features, num_classes, l2=L2):
    """Predicts the classes of `test_features`; see `few_shot_accuracies`."""
    features = features.astype("float64")
    mean, deviation = features.mean(axis=0), features.std(axis=0) + 1e-5

    def prepare(x):
        return np.pad((x - mean) / deviation, ((0, 0), (0, 1)), constant_values=BIAS)

    targets = 2.0 * np.eye(num_classes)[labels] - 1.0
    return np.argmax(prepare(test_features) @ ridge(prepare(features), targets, l2), axis=1)


def ridge(x, y, l2):
    """W = (X^T X + l2 I)^-1 X^T Y = X^T (X X^T + l2 I)^-1 Y, by the smaller of the two systems.

    Args:
        x: `(N, D)`.
        y: `(N, K)`.
        l2: The penalty, above 0.

    Returns:
        `(D, K)`.
    """
    images, width = x.shape
    if images >= width:
        return np.linalg.solve(x.T @ x + l2 * np.eye(width), x.T @ y)
    return x.T @ np.linalg.solve(x @ x.T + l2 * np.eye(images), y)
