use std::future::Future;
use std::time::{Duration, Instant};

/// Tries again and again until it succeeds or the time is up: then the last failure is returned.
pub async fn eventually<T, E, F: Future<Output = Result<T, E>>>(
    within: Duration,
    mut attempt: impl FnMut() -> F,
) -> Result<T, E> {
    let give_up = Instant::now() + within;
    loop {
        let result = attempt().await;
        if result.is_ok() || Instant::now() >= give_up {
            return result;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
