def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes minutes; `make test-all` runs it")
