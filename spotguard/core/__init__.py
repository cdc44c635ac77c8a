"""The core: decides, and does nothing else. Events in, commands out; time is a number in the event."""
