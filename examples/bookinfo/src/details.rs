//! `GET /details/ID`: what is known of a book.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Result;
use hyper::body::Incoming;
use hyper::{Method, Request, StatusCode};
use serde_json::{Value, json};

use crate::faults::{self, Faults};
use crate::server::{self, Answer};

/// Serves until the program is asked to end.
pub(crate) async fn run(listen: SocketAddr, faults: faults::Options) -> Result<()> {
    let faults = Arc::new(Faults::new(faults));
    server::serve(listen, move |request| {
        let faults = faults.clone();
        async move { answer(&request, &faults).await }
    })
    .await
}

async fn answer(request: &Request<Incoming>, faults: &Faults) -> Answer {
    match (request.method(), server::segments(request.uri().path()).as_slice()) {
        (&Method::GET, ["health"]) => server::healthy("Details"),
        (&Method::GET, ["details", id]) => match id.parse::<u32>() {
            Ok(id) => match faults.instead(id).await {
                Some(fault) => fault,
                None => server::json(StatusCode::OK, &book(id)),
            },
            Err(_) => server::error(StatusCode::BAD_REQUEST, "please provide numeric product id"),
        },
        _ => server::error(StatusCode::NOT_FOUND, "no such page"),
    }
}

fn book(id: u32) -> Value {
    json!({
        "id": id,
        "author": "William Shakespeare",
        "year": 1595,
        "type": "paperback",
        "pages": 200,
        "publisher": "PublisherA",
        "language": "English",
        "ISBN-10": "1234567890",
        "ISBN-13": "123-1234567890",
    })
}
