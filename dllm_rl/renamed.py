"""Public names of earlier versions, and what each is called now."""

RENAMED = {
    "Weigh": "WeightFn",
    "Weighed": "TokenWeights",
    "composed": "combine_weights",
    "no_weights": "unit_weights",
    "weigh": "weight_fn",
    "weighs": "weight_fns",
}
