"""From a radiance field, a score model or a rendering to another field, a picture, or a drawing."""
