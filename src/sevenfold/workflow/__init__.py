"""Recipes, steps and commands: recipe, steps, pipeline, training stages, chat, flags, cli, show."""
