"""The heads of the examples' tasks: fitted once, frozen, the same for every model compared."""

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn


def linear_head(features: Tensor, labels: Tensor, *, C: float = 1.0) -> nn.Linear:
    """A linear classifier of features [N, width], each class among the labels [N]; the smaller C, the smaller it is."""
    fitted = LogisticRegression(C=C, max_iter=2000).fit(features.numpy(), labels.numpy())
    weight, bias = torch.tensor(fitted.coef_).float(), torch.tensor(fitted.intercept_).float()
    if len(fitted.classes_) == 2:  # scikit-learn keeps the second class's logit only
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    head = nn.Linear(weight.shape[1], len(weight)).requires_grad_(False)
    head.load_state_dict({"weight": weight, "bias": bias})
    return head
