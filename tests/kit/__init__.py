"""What tests of several folders share: models, trainings, commands, artifacts, servers."""
