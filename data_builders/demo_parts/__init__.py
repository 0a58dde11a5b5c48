"""Turbine blades drawn by a program: 240 good ones to train on, 280 in four domains to test."""
