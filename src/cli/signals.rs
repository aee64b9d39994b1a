//! Ctrl-C and SIGTERM, and what they end.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::exit::{Exit, Failure};

/// A token that Ctrl-C or SIGTERM cancels. The second one ends the process at once; its children die with it.
pub fn stop_token() -> io::Result<CancellationToken> {
    stop_token_after(|| {})
}

/// As [`stop_token`]; does `this` before it is cancelled.
pub fn stop_token_after(this: impl FnOnce() + Send + 'static) -> io::Result<CancellationToken> {
    let stop = CancellationToken::new();
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let token = stop.clone();
    tokio::spawn(async move {
        either(&mut interrupt, &mut terminate).await;
        tracing::info!("stopping");
        this();
        token.cancel();
        either(&mut interrupt, &mut terminate).await;
        std::process::exit(Exit::Interrupted as i32);
    });
    Ok(stop)
}

/// What comes of `work`, unless `stop` is cancelled before.
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
