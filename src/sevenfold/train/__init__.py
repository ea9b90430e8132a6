"""How a model is trained: checkpoint config loop optimizer parallel planner recovery schedule."""
