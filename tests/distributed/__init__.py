"""Tests of trainings on several ranks, see `helpers`."""
