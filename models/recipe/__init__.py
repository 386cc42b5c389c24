"""The recipe that makes the built-in model: ``python -m ai_assistant.models.recipe all``.

It runs on the catalogue in `ai_assistant.actions` and on the phrase files beside it, on two CPU cores,
with fixed seeds. Nothing of it is installed on the appliance.
"""
