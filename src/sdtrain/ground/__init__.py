"""What everything rests on: it knows no params, no models and no other room."""
