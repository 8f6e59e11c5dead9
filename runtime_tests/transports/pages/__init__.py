"""Workers in a page: its server, headless Chromium here, and the browser of a phone in the network or behind adb."""
