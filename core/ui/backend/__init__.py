"""Behind the page: the model and its concepts, jobs and who may still run them, and checks of what people enter.

Nothing here knows the page's components.
"""
