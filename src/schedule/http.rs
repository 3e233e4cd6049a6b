//! `/health` and `/metrics`.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use serde_json::json;

use super::Server;
use super::due::next;
use crate::clock;

/// Answers until it is aborted.
pub(super) async fn answer(listener: tokio::net::TcpListener, server: Arc<Server>) {
    let router = Router::new().route("/health", get(health)).route("/metrics", get(metrics)).with_state(server);
    if let Err(error) = axum::serve(listener, router).await {
        tracing::error!(%error, "health and metrics are no longer served");
    }
}

/// 200 while jobs are scheduled, 503 while stopping.
async fn health(State(server): State<Arc<Server>>) -> impl IntoResponse {
    let stopping = server.stopping.load(Ordering::SeqCst);
    let now = clock::now();
    let jobs: Vec<_> = server
        .jobs
        .iter()
        .map(|job| {
            json!({
                "job": job.name,
                "running": job.running.load(Ordering::SeqCst),
                "next_due": next(&job.schedule, now),
                "retry_at": job.standing().retry_at(),
                "last_status": server.metrics.last_status(&job.name),
            })
        })
        .collect();
    let status = if stopping { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK };
    let body = json!({"schema": "trueup.health/1", "status": if stopping { "stopping" } else { "ok" }, "jobs": jobs});
    (status, [(header::CONTENT_TYPE, "application/json")], body.to_string())
}

async fn metrics(State(server): State<Arc<Server>>) -> impl IntoResponse {
    let running = server.jobs.iter().map(|job| (job.name.as_str(), job.running.load(Ordering::SeqCst)));
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], server.metrics.render(running))
}
