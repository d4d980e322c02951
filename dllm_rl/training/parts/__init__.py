"""The optional parts of a step (`StepFeature`) that a recipe may ask for. `make_step.run_features` makes them."""
