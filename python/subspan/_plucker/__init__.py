"""Parts of subspan.plucker."""
