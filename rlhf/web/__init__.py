"""What the pages of `rlhf.rank` and `rlhf.chat web=true` share: server, guard, Markdown, style."""
