//! What `bench` and `verify` ask.

use std::path::PathBuf;

use clap::Args;

use super::deployment::Deployment;
use super::exit::{Exit, Failure};
use crate::bench::Prompt;
use crate::upstream::chat::Wishes;

/// Which prompts.
#[derive(Debug, Args)]
pub struct QuestionSet {
    /// Prompts to ask instead of the usual ones: lines such as {"kind": "chat", "prompt": "Hello"}; instead of `prompt`
    /// also `messages`, a list of objects with `role` and `content`; and perhaps `prediction`, for --prediction.
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
    /// Send what the prompts predict of their answers (of the usual ones those of the kind edit do), as OpenAI's
    /// `prediction`. The proxy drafts from it; stock servers ignore it.
    #[arg(long)]
    pub prediction: bool,
}

impl QuestionSet {
    /// The prompts.
    pub fn prompts(&self) -> Result<Vec<Prompt>, Failure> {
        let all = match &self.prompts {
            Some(file) => Prompt::read(file)?,
            None => Prompt::shipped()?,
        };
        let mut prompts = Prompt::of_kinds(all, &self.kinds)?;
        if !self.prediction {
            for prompt in &mut prompts {
                prompt.prediction = None;
            }
        } else if prompts.iter().all(|prompt| prompt.prediction.is_none()) {
            let message = "none of the prompts has a `prediction`; leave --prediction out, or ask e.g. --kinds edit";
            return Err(Failure::new(Exit::Usage, message));
        }
        Ok(prompts)
    }

    /// What all requests say.
    pub fn wishes(&self, temperature: f64, deployment: &Deployment) -> Wishes {
        Wishes {
            max_tokens: Some(self.max_tokens),
            temperature: Some(temperature),
            seed: Some(self.seed.into()),
            // Else whoever asks second finds the prompt read already.
            forget_prompt: deployment.is_llama_server,
            token_ids: false,
        }
    }
}
