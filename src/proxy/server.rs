//! Serves the proxy.

use std::sync::Arc;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::router::{App, router};
use super::settings::Settings;
use crate::engine::Engine;
use crate::http::serve::{self, ServeOptions};
use crate::http::target::TargetError;

/// Why the proxy cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// There is no client for the target.
    #[error(transparent)]
    Target(#[from] TargetError),
}

/// Serves on `listener` until `shutdown`; then takes no more requests, gives the running ones `settings.drain` to end,
/// and cuts the rest off: streams with an error event.
pub async fn serve(
    listener: TcpListener,
    settings: Settings,
    engine: Arc<Engine>,
    shutdown: CancellationToken,
) -> Result<(), ServeError> {
    let (limits, drain) = (settings.limits.clone(), settings.drain);
    let app = App::new(settings, engine)?;
    let options = ServeOptions {
        limits,
        drain,
        shutdown,
        cut_off: app.cut_off.clone(),
    };
    serve::serve(listener, router(app), options).await;
    Ok(())
}
