"""Behind the page: the model and its concepts, jobs, their queue and who may still run them, checks of what people
enter, and what stands between them and the web.

Nothing here knows the page's components.
"""
