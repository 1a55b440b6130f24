//! `GET` and `POST /ratings/ID`: the stars that readers give, kept in memory.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use hyper::body::Incoming;
use hyper::{Method, Request, StatusCode};
use serde_json::{Value, json};

use crate::faults::{self, Faults};
use crate::server::{self, Answer};

/// Books with ratings of their own; further ones are refused.
const MAX_BOOKS: usize = 10_000;

type Stars = BTreeMap<String, u8>;

/// Ratings by book. The lock is held for a look-up or an insertion, never across an await.
type Ratings = Arc<Mutex<BTreeMap<u32, Stars>>>;

/// Serves until the program is asked to end.
pub(crate) async fn run(listen: SocketAddr, faults: faults::Options) -> Result<()> {
    let (ratings, faults) = (Ratings::default(), Arc::new(Faults::new(faults)));
    server::serve(listen, move |request| answer(request, ratings.clone(), faults.clone())).await
}

async fn answer(request: Request<Incoming>, ratings: Ratings, faults: Arc<Faults>) -> Answer {
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    match (method, server::segments(&path).as_slice()) {
        (Method::GET, ["health"]) => server::healthy("Ratings"),
        (Method::GET, ["ratings", id]) => match id.parse() {
            Ok(id) => match faults.instead(id).await {
                Some(fault) => fault,
                None => server::json(StatusCode::OK, &shown(id, &stars(&ratings, id))),
            },
            Err(_) => server::error(StatusCode::BAD_REQUEST, "please provide numeric product ID"),
        },
        (Method::POST, ["ratings", id]) => match id.parse() {
            Ok(id) => post(id, request, &ratings).await,
            Err(_) => server::error(StatusCode::BAD_REQUEST, "please provide numeric product ID"),
        },
        _ => server::error(StatusCode::NOT_FOUND, "no such page"),
    }
}

fn stars(ratings: &Ratings, id: u32) -> Stars {
    let ratings = ratings.lock().unwrap_or_else(PoisonError::into_inner);
    let usual = || Stars::from([("Reviewer1".to_owned(), 5), ("Reviewer2".to_owned(), 4)]);
    ratings.get(&id).cloned().unwrap_or_else(usual)
}

async fn post(id: u32, request: Request<Incoming>, ratings: &Ratings) -> Answer {
    let body = match server::read_json(request).await {
        Ok(body) => body,
        Err(error) => return server::error(StatusCode::BAD_REQUEST, &format!("{error:#}")),
    };
    let Ok(stars) = serde_json::from_value::<Stars>(body) else {
        return server::error(StatusCode::BAD_REQUEST, "please provide valid ratings JSON");
    };
    let mut ratings = ratings.lock().unwrap_or_else(PoisonError::into_inner);
    if ratings.len() >= MAX_BOOKS && !ratings.contains_key(&id) {
        return server::error(StatusCode::INSUFFICIENT_STORAGE, "too many books");
    }
    let answer = shown(id, &stars);
    ratings.insert(id, stars);
    server::json(StatusCode::OK, &answer)
}

fn shown(id: u32, stars: &Stars) -> Value {
    json!({"id": id, "ratings": stars})
}
