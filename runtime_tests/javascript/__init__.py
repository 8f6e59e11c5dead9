"""The worker of JavaScript runtimes: ES modules that run in Node and in a browser, shipped as package data."""
