"""How a model is trained: config, loop, optimizer, schedule, parallel, checkpoint, recovery, planner."""
