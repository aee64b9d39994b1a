//! What `bench` and `verify` ask.

use std::path::PathBuf;

use clap::Args;

use super::exit::Failure;
use crate::bench::Prompt;

/// Which prompts.
#[derive(Debug, Args)]
pub struct QuestionSet {
    /// Prompts to ask instead of the usual ones: lines such as {"kind": "chat", "prompt": "Hello"}; instead of `prompt`
    /// also `messages`, a list of objects with `role` and `content`.
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Only prompts of these kinds; the usual ones are of: code, chat, list, reasoning, creative, edit, summary.
    #[arg(long, value_name = "KIND,…", value_delimiter = ',')]
    kinds: Vec<String>,
    /// Longest answer in tokens.
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_tokens: u32,
    /// Seed of the sampler, the same for every request.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u32,
}

impl QuestionSet {
    /// The prompts.
    pub fn prompts(&self) -> Result<Vec<Prompt>, Failure> {
        let all = match &self.prompts {
            Some(file) => Prompt::read(file)?,
            None => Prompt::shipped()?,
        };
        Ok(Prompt::of_kinds(all, &self.kinds)?)
    }
}
