//! Ctrl-C, SIGTERM and SIGHUP as cancellation. The second signal ends the process at once.

use std::io::{self, IsTerminal};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::exit::{Exit, Failure};

/// A token that Ctrl-C or SIGTERM cancels. The second one ends the process at once; its children die with it.
pub fn stop_token() -> io::Result<CancellationToken> {
    stop_token_after(|| {})
}

/// Like [`stop_token`]; calls `this` before the token is cancelled.
pub fn stop_token_after(this: impl FnOnce() + Send + 'static) -> io::Result<CancellationToken> {
    let stop = CancellationToken::new();
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    // SIGHUP from a closed terminal ends the program. In a service it would mean a reload of the config, so it is ignored there.
    let has_terminal = io::stdin().is_terminal() || io::stderr().is_terminal();
    let token = stop.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = interrupt.recv() => break,
                _ = terminate.recv() => break,
                _ = hang_up.recv() => {}
            }
            if has_terminal {
                tracing::info!("the terminal is closed (SIGHUP)");
                break;
            }
            tracing::warn!("SIGHUP is ignored: a changed config takes a restart");
        }
        tracing::info!("stopping");
        this();
        token.cancel();
        either(&mut interrupt, &mut terminate).await;
        std::process::exit(Exit::Interrupted as i32);
    });
    Ok(stop)
}

/// Runs `work` until it ends or `stop` is cancelled.
pub async fn unless_stopped<T>(
    stop: &CancellationToken,
    work: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    let interrupted = || Failure::new(Exit::Interrupted, "interrupted before all was asked");
    stop.run_until_cancelled(work).await.ok_or_else(interrupted)?
}

async fn either(one: &mut Signal, other: &mut Signal) {
    tokio::select! {
        _ = one.recv() => {}
        _ = other.recv() => {}
    }
}
