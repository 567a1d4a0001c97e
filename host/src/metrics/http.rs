//! The three answers, over HTTP: everything else is refused. Whoever is slow, many or long-winded is hung up on, and costs
//! at most a few buffers.

use core::convert::Infallible;
use core::time::Duration;
use std::sync::Arc;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

use super::Monitor;

/// Those who ask at a time; further ones are hung up on.
const MAX_CONNECTIONS: usize = 32;
/// Within this a request has come, and its answer has been read.
const HEAD_WITHIN: Duration = Duration::from_secs(5);
const DONE_WITHIN: Duration = Duration::from_secs(15);
/// Bytes of a request's head.
const MAX_HEAD_LEN: usize = 8 * 1024;
const MAX_HEADERS: usize = 64;
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const TEXT: &str = "text/plain; charset=utf-8";

/// Answers whoever connects to `listener`. Never returns; drop it to stop.
pub async fn serve(listener: TcpListener, monitor: Arc<Monitor>) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        match listener.accept().await {
            Ok((stream, address)) => {
                let Ok(permit) = Arc::clone(&permits).try_acquire_owned() else {
                    debug!(%address, "too many ask for metrics");
                    continue;
                };
                let monitor = Arc::clone(&monitor);
                tokio::spawn(async move {
                    if timeout(DONE_WITHIN, attend(stream, &monitor)).await.is_err() {
                        debug!(%address, "too slow for metrics");
                    }
                    drop(permit);
                });
            }
            Err(error) => {
                warn!(%error, "cannot accept connections for metrics: trying again after a pause");
                sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

async fn attend(stream: TcpStream, monitor: &Monitor) {
    let service = service_fn(async |request: Request<Incoming>| Ok::<_, Infallible>(answer(&request, monitor).await));
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_WITHIN)
        .max_buf_size(MAX_HEAD_LEN)
        .max_headers(MAX_HEADERS)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        debug!(%error, "a request for metrics failed");
    }
}

async fn answer(request: &Request<Incoming>, monitor: &Monitor) -> Response<Full<Bytes>> {
    let path = request.uri().path();
    if !matches!(path, "/healthz" | "/metrics" | "/readyz") {
        return response(StatusCode::NOT_FOUND, TEXT, "there are /metrics, /healthz and /readyz\n");
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut refused = response(StatusCode::METHOD_NOT_ALLOWED, TEXT, "only GET and HEAD\n");
        refused.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return refused;
    }
    match path {
        "/metrics" => response(StatusCode::OK, OPENMETRICS, monitor.text()),
        // This answer is what it tells: the process runs, and its tasks with it.
        "/healthz" => response(StatusCode::OK, TEXT, "ok\n"),
        _ => match monitor.obstacles().await.as_slice() {
            [] => response(StatusCode::OK, TEXT, "ready\n"),
            obstacles => response(StatusCode::SERVICE_UNAVAILABLE, TEXT, obstacles.join("\n") + "\n"),
        },
    }
}

fn response(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
