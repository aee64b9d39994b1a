//! The prompts and request parameters of `bench` and `verify`.

use std::path::PathBuf;

use clap::Args;

use super::deployment::Deployment;
use super::exit::{Exit, Failure};
use crate::bench::Prompt;
use crate::upstream::chat::Wishes;

/// Options for the prompts.
#[derive(Debug, Args)]
pub struct QuestionSet {
    /// File of prompts to use instead of the built-in ones, with lines such as {"kind": "chat", "prompt": "Hello"}. Instead of
    /// `prompt`, a line may have `messages`, a list of objects with `role` and `content`. For --prediction, it may have
    /// `prediction`
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Only prompts of these kinds. The built-in kinds are code, chat, list, reasoning, creative, edit and summary
    #[arg(long, value_name = "KIND,…", value_delimiter = ',')]
    kinds: Vec<String>,
    /// Longest answer in tokens
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_tokens: u32,
    /// Seed of the sampler for every request
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u32,
    /// Send the prediction of a prompt, if it has one, as OpenAI's `prediction`. Built-in prompts of the kind edit have one. The
    /// proxy drafts from it; stock servers ignore it
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

    /// Parameters of all requests.
    pub fn wishes(&self, temperature: f64, deployment: &Deployment) -> Wishes {
        Wishes {
            max_tokens: Some(self.max_tokens),
            temperature: Some(temperature),
            seed: Some(self.seed.into()),
            // Otherwise the second mode would find the prompt in the cache.
            forget_prompt: deployment.is_llama_server,
            token_ids: false,
        }
    }
}
