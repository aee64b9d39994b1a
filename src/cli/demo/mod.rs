//! `tightwad demo`: shows what drafting gains on this machine, without a config. Starts a target, a draft and the proxy, and ends all of
//! them.

mod rows;
mod table;

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use futures_util::TryFutureExt;
use tokio_util::sync::CancellationToken;

use super::embedded_proxy::{EmbeddedProxy, why_undrafted};
use super::exit::{Exit, Failure};
use super::output::say;
use super::progress::Countdown;
use super::signals::{self, unless_stopped};
use super::{bench, progress, proxy};
use crate::bench::{Contender, Measurements, Mode, Plan, Progress, Prompt, measure};
use crate::config::{self, Binaries, Model, Secret, Upstream};
use crate::gguf::ModelFile;
use crate::http::auth::unguessable;
use crate::supervise::command::Role;
use crate::supervise::preflight;
use crate::supervise::service::Service;
use crate::upstream::ChatServer;
use crate::upstream::chat::Wishes;

/// Context per slot: more than the demo needs, and no more than small models were trained for.
const CTX_SIZE: u32 = 2048;
/// Requests at once.
const SLOTS: u16 = 2;
/// Time limit for the engine to probe both servers.
const PROBE_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest answer in tokens.
const MAX_TOKENS: u32 = 120;
/// Kinds of prompts that the tiny models in tests/models can answer.
const KINDS: [&str; 5] = ["code", "chat", "list", "reasoning", "creative"];
/// Prompts of each kind.
const PROMPTS: usize = 2;

/// Options of `demo`.
#[derive(Debug, Args)]
pub struct Options {
    /// File of the big model
    #[arg(long, value_name = "GGUF")]
    target_model: PathBuf,
    /// File of the small model
    #[arg(long, value_name = "GGUF")]
    draft_model: PathBuf,
    /// The llama-server program, as a name or a path
    #[arg(long, value_name = "PROGRAM", default_value = "llama-server")]
    llama_server: PathBuf,
    /// CPU threads of each server
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    threads: u16,
    /// Port of the endpoint
    #[arg(long, value_name = "PORT", default_value_t = 8088)]
    port: u16,
    /// End after the table, with exit code 1 if a drafted answer differs from the plain one
    #[arg(long)]
    once: bool,
    /// Print the measurements as JSON instead of the table
    #[arg(long)]
    json: bool,
    /// Further arguments for both llama-servers, after `--`
    #[arg(last = true, value_name = "LLAMA_ARGS")]
    llama_args: Vec<String>,
}

/// Starts the servers, measures, and serves until Ctrl-C.
pub async fn demo(options: &Options) -> Result<(), Failure> {
    let stop = signals::stop_token()?;
    let section = config::Proxy {
        port: options.port,
        ..config::Proxy::default()
    };
    let listener = proxy::listen(&section).await?;
    let url = config::local_url(&section.host, listener.local_addr()?.port());

    // Not `stop` itself: the servers must outlive the proxy, which finishes its running answers.
    let servers = CancellationToken::new();
    let key = Secret::new(unguessable());
    let (target, target_url) = start(options, Role::Target, &key, &servers).await?;
    let (draft, draft_url) = start(options, Role::Draft, &key, &servers).await?;
    let mut services = [(Role::Target, target), (Role::Draft, draft)];
    for (role, service) in &mut services {
        unless_stopped(&stop, progress::until_ready(*role, service).map_err(Failure::from)).await?;
    }

    let section = config::Proxy {
        target: Some(Upstream {
            model_name: Some("target".into()),
            api_key: Some(key.clone()),
            ..Upstream::at(&target_url)
        }),
        draft: vec![Upstream {
            model_name: Some("draft".into()),
            api_key: Some(key.clone()),
            ..Upstream::at(draft_url)
        }],
        ..section
    };
    let embedded_proxy = EmbeddedProxy::start(listener, section)?;
    let equal = compare(options, (&target_url, &key), &url, &stop).await?;
    if !options.once {
        serve_on(&url, &mut services, &stop).await?;
    }
    // The proxy ends first, because its last answers need the servers.
    embedded_proxy.close().await?;
    for (_, service) in services {
        service.stop().await;
    }
    if options.once && !equal {
        return Err(Failure::new(
            Exit::Other,
            "a drafted answer differs from the plain one; see the table",
        ));
    }
    Ok(())
}

/// Starts a server that requires `key`, so that web pages and other users of this machine cannot use it.
async fn start(
    options: &Options,
    role: Role,
    key: &Secret,
    servers: &CancellationToken,
) -> Result<(Service, String), Failure> {
    let path = match role {
        Role::Target | Role::Coordinator => &options.target_model,
        Role::Draft | Role::Rpc => &options.draft_model,
    };
    let server = config::Server {
        port: preflight::free_port()?,
        slots: SLOTS,
        threads: Some(options.threads),
        api_key: Some(key.clone()),
        extra_args: options.llama_args.clone(),
        ..config::Server::default()
    };
    let model = Model {
        path: path.clone(),
        ctx_size: CTX_SIZE,
        predict: None,
        flash_attn: None,
        cache_type_k: None,
        cache_type_v: None,
        default: true,
        extra_args: Vec::new(),
    };
    let binaries = Binaries {
        llama_server: options.llama_server.clone(),
        ..Binaries::default()
    };
    let drafts = config::MaxDraftTokens::default();
    let launch = preflight::llama_server(role, &binaries, &server, (role.as_str(), &model), drafts).await?;
    ModelFile::check_complete(path)?;
    let url = launch.url();
    Ok((Service::start(role, launch, servers), url))
}

/// Measures and prints. After Ctrl-C or a failure, prints the results so far. Returns whether all answers are equal.
async fn compare(
    options: &Options,
    (target_url, target_key): (&str, &Secret),
    proxy_url: &str,
    stop: &CancellationToken,
) -> Result<bool, Failure> {
    let contender = |mode, url: &str, key| {
        let server = ChatServer::new(url, key, None)?;
        Ok::<_, Failure>(Contender {
            mode,
            server,
            verifier: None,
        })
    };
    let contenders = [
        contender(Mode::Plain, target_url, Some(target_key.clone()))?,
        contender(Mode::Attached, proxy_url, None)?,
    ];
    let looking = why_undrafted(&contenders[1].server, PROBE_TIMEOUT).map_err(Failure::from);
    if let Some(reason) = unless_stopped(stop, looking).await? {
        say(format_args!("note: answers will not be drafted: {reason}"));
    }
    let prompts = Prompt::of_kinds(Prompt::shipped()?, &KINDS.map(str::to_owned))?;
    let prompts = Prompt::first_of_each_kind(&prompts, PROMPTS);
    let plan = Plan {
        rounds: 1,
        clients: 1,
        wishes: Wishes {
            max_tokens: Some(MAX_TOKENS),
            temperature: Some(0.0),
            forget_prompt: true,
            ..Wishes::default()
        },
    };
    let table = table::Table::new(options.json);
    table.head()?;
    let mut rows = Vec::new();
    let mut printed = Ok(());
    let mut measured = Measurements::default();
    let mut countdown = Countdown::new();
    let asking = measure(&plan, &prompts, &contenders, &mut measured, |progress| {
        bench::show(&mut countdown, progress, (0, 1));
        if let Progress::Answered(samples) = progress
            && let Some(sample) = samples.first()
        {
            let row = rows::Row::of(&prompts[sample.prompt], samples);
            countdown.clear();
            if printed.is_ok() {
                printed = table.row(&row);
            }
            rows.push(row);
        }
    });
    let asked = unless_stopped(stop, asking.map_err(Failure::from)).await;
    countdown.clear();
    printed?;
    let report = rows::Report::of(rows, &measured, asked.is_ok());
    if !report.rows.is_empty() {
        table.foot(&report)?;
    }
    asked.map(|()| report.total.equal)
}

/// Serves until Ctrl-C, or until a server is given up.
async fn serve_on(url: &str, services: &mut [(Role, Service); 2], stop: &CancellationToken) -> Result<(), Failure> {
    say(format_args!("\nserving on {url}/v1 until Ctrl-C; try:\n"));
    say(format_args!(
        "  curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n    -d '{{\"stream\": true, \
         \"messages\": [{{\"role\": \"user\", \"content\": \"Count from 1 to 30.\"}}]}}'\n"
    ));
    let [(_, target), (_, draft)] = services;
    tokio::select! {
        () = stop.cancelled() => Ok(()),
        ended = target.ended() => Ok(ended?),
        ended = draft.ended() => Ok(ended?),
    }
}
